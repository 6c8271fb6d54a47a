// In a CPU-only build: tells whoever hands over CUDA tensors what to do, in one sentence.
#if !defined(EMBED_EXT_WITH_CUDA)
#include <torch/library.h>

#include "cuda/dense_gradient.h"

namespace {

[[noreturn]] void raise_no_cuda(const std::string& op) {
  TORCH_CHECK(false, op,
              ": this build of embed_ext has no CUDA kernels, but got CUDA tensors; reinstall it "
              "where torch.version.cuda is set and a CUDA toolkit is found (CUDA_HOME), or move "
              "the tensors to the CPU.");
}

void raise_for_op(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  raise_no_cuda(op.schema().name());
}

}  // namespace

namespace embed_ext::cuda {

at::Tensor gradient_in_kept_memory(const char* op, const DenseGradient& /*task*/,
                                   KeptGradient& /*kept*/) {
  raise_no_cuda(op);
}

void add_gradient(const char* op, const DenseGradient& /*task*/, const at::Tensor& /*table*/,
                  KeptGradient* /*kept*/) {
  raise_no_cuda(op);
}

}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  for (const char* op : {"embedding", "embedding_dense_backward", "embedding_sparse_backward",
                         "embedding_grad_add_", "embedding_renorm_"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&raise_for_op>());
  }
}
#endif
