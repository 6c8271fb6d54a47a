#include "index_check.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace embed_ext {
namespace {

IndexCheckMode mode_from_environment() {
  const char* value = std::getenv("EMBED_EXT_INDEX_CHECK");
  const std::string name = value == nullptr ? "" : value;
  if (name.empty() || name == "lazy") {
    return IndexCheckMode::kLazy;
  }
  if (name == "sync") {
    return IndexCheckMode::kSync;
  }
  TORCH_CHECK(name == "none", "EMBED_EXT_INDEX_CHECK: expected lazy, sync or none, but got ", name);
  return IndexCheckMode::kNone;
}

std::atomic<IndexCheckMode>& mode() {
  static std::atomic<IndexCheckMode> value{mode_from_environment()};
  return value;
}

}  // namespace

IndexCheckMode index_check_mode() { return mode().load(std::memory_order_relaxed); }

void set_index_check_mode(IndexCheckMode value) { mode().store(value, std::memory_order_relaxed); }

#if !defined(EMBED_EXT_WITH_CUDA)
void check_indices_now() {}
#endif

}  // namespace embed_ext
