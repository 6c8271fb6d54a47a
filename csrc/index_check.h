// When a bad index on a CUDA device is reported. (On the CPU it always raises at the call.)
#pragma once

namespace embed_ext {

enum class IndexCheckMode {
  kLazy,  // by the next embed_ext call or an explicit check; no call waits for the device
  kSync,  // by the call itself, which waits for the device
  kNone,  // never, nor are reports of before looked at; a bad index still touches nothing outside
};

// Starts as EMBED_EXT_INDEX_CHECK (lazy, sync, none) says, else lazy.
IndexCheckMode index_check_mode();
void set_index_check_mode(IndexCheckMode mode);

// Waits for every device in use and raises the IndexError that one of them holds, if any.
void check_indices_now();

}  // namespace embed_ext
