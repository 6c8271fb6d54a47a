"""What training a table costs, optimizer included, whoever makes its gradient."""
