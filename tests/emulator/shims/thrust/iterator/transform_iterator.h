// In place of Thrust's: what shims/cub/device/device_scan.cuh asks of it.
#pragma once

#include <cstddef>

namespace thrust {

template <class Function, class Iterator>
struct transform_iterator {
  Iterator from;
  Function function;
  auto operator[](ptrdiff_t i) const { return function(from[i]); }
};

template <class Function, class Iterator>
transform_iterator<Function, Iterator> make_transform_iterator(Iterator from, Function function) {
  return {from, function};
}

}  // namespace thrust
