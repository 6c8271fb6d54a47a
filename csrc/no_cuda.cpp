// In a CPU-only build: tells whoever hands over CUDA tensors what to do, in one sentence.
#if !defined(EMBED_EXT_WITH_CUDA)
#include <torch/library.h>

namespace {

void raise_no_cuda(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK(false, op.schema().name(),
              ": this build of embed_ext has no CUDA kernels, but got CUDA tensors; reinstall it "
              "where torch.version.cuda is set and a CUDA toolkit is found (CUDA_HOME), or move "
              "the tensors to the CPU.");
}

}  // namespace

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  for (const char* op :
       {"embedding", "embedding_dense_backward", "embedding_sparse_backward", "embedding_grad_add_",
        "embedding_renorm_", "embedding_sgd_", "embedding_adagrad_", "embedding_adam_"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&raise_no_cuda>());
  }
}
#endif
