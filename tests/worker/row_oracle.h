// What every row of a sequence must be: a function of all tokens up to and including its own, of
// the layer and of K or V. Rows of another sequence, another prefix, another slot or another layer
// differ, so a test that compares rows needs no second cache to know what is right.
#ifndef PAGETIDE_TESTS_WORKER_ROW_ORACLE_H_
#define PAGETIDE_TESTS_WORKER_ROW_ORACLE_H_

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "core/geometry.h"

namespace pagetide {

class RowOracle {
 public:
  // Folds one more token into the state of a prefix.
  static uint64_t Fold(uint64_t prefix_state, uint32_t token) {
    return Mix(prefix_state * 0x9e3779b97f4a7c15u + token + 1);
  }
  static uint64_t StateOf(std::span<const uint32_t> tokens) {
    uint64_t state = 0;
    for (uint32_t token : tokens) state = Fold(state, token);
    return state;
  }
  // The row of the last token of a prefix in `state`.
  static void FillRow(uint64_t state, uint32_t group, uint32_t layer, RowKind kind,
                      std::span<std::byte> row) {
    uint64_t x =
        Mix(state ^ (uint64_t{group} << 40) ^ (uint64_t{layer} << 8) ^ static_cast<uint64_t>(kind));
    for (size_t i = 0; i < row.size(); ++i) {
      if (i % 8 == 0) x = Mix(x + i);
      row[i] = static_cast<std::byte>(x >> (8 * (i % 8)));
    }
  }
  // Rows of tokens [begin, end) of one layer, token-major.
  static std::vector<std::byte> Rows(std::span<const uint32_t> tokens, uint64_t begin, uint64_t end,
                                     uint32_t group, uint32_t layer, RowKind kind,
                                     uint32_t row_bytes) {
    std::vector<std::byte> out((end - begin) * row_bytes);
    uint64_t state = 0;
    for (uint64_t i = 0; i < end; ++i) {
      state = Fold(state, tokens[i]);
      if (i < begin) continue;
      FillRow(state, group, layer, kind,
              std::span(out).subspan((i - begin) * row_bytes, row_bytes));
    }
    return out;
  }

 private:
  static uint64_t Mix(uint64_t x) {  // splitmix64's finaliser
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_ROW_ORACLE_H_
