// join: rows of up to JOINED sources, one after the other, so that one product serves them all
//
// Row j of the result is row `rows[2j + 1]` of the source `rows[2j]`. The threadgroups of a row share
// its elements. No threadgroup memory, no barrier; every byte is read once.

namespace flash_head {

template <typename T, typename Source>
inline void copy_row(
    Source source, uint from, device T* target, uint to, uint n, uint first, uint step) {
  for (uint i = first; i < n; i += step) {
    target[size_t(to) * n + i] = source[size_t(from) * n + i];
  }
}

}  // namespace flash_head
