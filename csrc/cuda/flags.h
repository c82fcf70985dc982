#pragma once

#include <utility>

namespace m3bind::cuda {

// f(flags) as an std::integer_sequence, for flags that are known when the program runs.
template <bool... KNOWN, class F>
void with_flags(const F& f) {
  f(std::integer_sequence<bool, KNOWN...>{});
}

template <bool... KNOWN, class F, class... Flags>
void with_flags(const F& f, bool flag, Flags... flags) {
  if (flag)
    with_flags<KNOWN..., true>(f, flags...);
  else
    with_flags<KNOWN..., false>(f, flags...);
}

}  // namespace m3bind::cuda
