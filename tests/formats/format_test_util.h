// Helpers of the format tests: states with made-up rows, files of the tree, and a run of one
// hostile change after another over a good file.
#ifndef PAGETIDE_TESTS_FORMATS_FORMAT_TEST_UTIL_H_
#define PAGETIDE_TESTS_FORMATS_FORMAT_TEST_UTIL_H_

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "formats/sequence_state.h"

namespace pagetide {

// Rows of random bytes, kept in memory: the oracle of a round trip.
class MemoryRows : public RowReader {
 public:
  MemoryRows(const SequenceState* state, uint64_t seed) : state_(state) {
    std::mt19937_64 random(seed);
    for (size_t b = 0; b < state->blocks.size(); ++b) {
      const RowBlock& block = state->blocks[b];
      for (size_t l = 0; l < block.layers.size(); ++l) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          std::string bytes(block.layers[l].of(kind).bytes * block.positions.size(), '\0');
          for (char& c : bytes) c = static_cast<char>(random());
          rows_[{b, l, kind}] = std::move(bytes);
        }
      }
    }
  }
  absl::Status ReadRows(const RowRange& range, std::span<std::byte> out) const override {
    const absl::Status ok = CheckRange(*state_, range, out.size());
    if (!ok.ok()) return ok;
    const uint64_t row = state_->blocks[range.block].layers[range.layer].of(range.kind).bytes;
    std::memcpy(out.data(), Of(range.block, range.layer, range.kind).data() + range.first * row,
                out.size());
    return absl::OkStatus();
  }
  const std::string& Of(size_t block, size_t layer, RowKind kind) const {
    return rows_.at({block, layer, kind});
  }

 private:
  const SequenceState* state_;
  std::map<std::tuple<size_t, size_t, RowKind>, std::string> rows_;
};

// All rows of one layer, read in runs of `step` rows.
inline std::string ReadAll(const RowReader& rows, const SequenceState& state, size_t block,
                           size_t layer, RowKind kind, uint64_t step = 7) {
  const uint64_t n = state.blocks[block].positions.size();
  const uint64_t row = state.blocks[block].layers[layer].of(kind).bytes;
  std::string out(n * row, '\0');
  for (uint64_t first = 0; first < n && row > 0; first += step) {
    const uint64_t count = std::min(step, n - first);
    const absl::Status status =
        rows.ReadRows({block, layer, kind, first, count},
                      {reinterpret_cast<std::byte*>(out.data()) + first * row, count * row});
    EXPECT_TRUE(status.ok()) << status;
  }
  return out;
}

inline std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.is_open()) << path;
  return std::string(std::istreambuf_iterator<char>(in), {});
}

inline std::string TestFile(const std::string& name) {
  return ReadFile(std::string(PAGETIDE_SOURCE_DIR) + "/tests/formats/testdata/" + name);
}

// Cuts `good` at every length (or at 4,000 lengths) and overwrites each of its first 600 bytes and
// random others with hostile values; `parse` must never crash, and must refuse every cut.
inline void CheckHostileVariants(const std::string& good,
                                 const std::function<absl::Status(absl::string_view)>& parse) {
  ASSERT_TRUE(parse(good).ok()) << parse(good);
  const size_t step = std::max<size_t>(1, good.size() / 4000);
  for (size_t n = 0; n < good.size(); n += step) {
    // A copy of its own, so that a sanitizer sees a read behind the end.
    const std::string cut = good.substr(0, n);
    const absl::Status status = parse(cut);
    EXPECT_TRUE(absl::IsDataLoss(status) || absl::IsInvalidArgument(status))
        << "cut to " << n << " of " << good.size() << ": " << status;
  }
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (int i = 0; i < 4000; ++i) {
    std::string changed = good;
    const size_t at = i < 600 ? i % good.size() : random() % good.size();
    const uint64_t values[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, ~uint64_t{0}, random()};
    const uint64_t value = values[random() % std::size(values)];
    const size_t n = std::min<size_t>(size_t{1} << (random() % 4), changed.size() - at);
    std::memcpy(changed.data() + at, &value, n);
    const absl::Status status = parse(changed);
    EXPECT_TRUE(status.ok() || absl::IsDataLoss(status) || absl::IsInvalidArgument(status))
        << status;
  }
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_FORMATS_FORMAT_TEST_UTIL_H_
