// Memory for the length of one call, kept by its thread for the next: that of a large batch would
// otherwise be mapped anew each time, and its page faults cost about as much as sorting it.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

namespace embed_ext::cpu {

class Scratch {
 public:
  // `bytes` of uninitialised memory, aligned for every scalar type.
  explicit Scratch(size_t bytes) : block_(std::exchange(kept(), Block())) {
    if (block_.bytes < bytes) {
      block_ = Block();  // first, so that never both are there
      block_ = {std::unique_ptr<char[]>(new char[bytes]), bytes};
    }
  }

  ~Scratch() {
    if (block_.bytes <= kMostKept && block_.bytes > kept().bytes) {
      kept() = std::move(block_);
    }
  }

  Scratch(Scratch&& other) noexcept : block_(std::exchange(other.block_, Block())) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Scratch& operator=(Scratch&&) = delete;

  char* data() const { return block_.data.get(); }

 private:
  static constexpr size_t kMostKept = size_t(8) << 20;  // by each thread

  struct Block {
    std::unique_ptr<char[]> data;
    size_t bytes = 0;
  };

  // Empty while it is in use: a call inside that one gets memory of its own.
  static Block& kept() {
    static thread_local Block block;
    return block;
  }

  Block block_;
};

}  // namespace embed_ext::cpu
