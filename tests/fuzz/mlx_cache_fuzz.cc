// MLX prompt caches: no bytes crash the parsers of files and layouts; what they accept has rows
// that can be read, and is written again with the same header and rows. Input: one byte (file or
// layout), then the bytes.
#include "formats/mlx_cache.h"

#include <string>
#include <vector>

#include "tests/fuzz/fuzz_check.h"

namespace {

std::string Write(const pagetide::MlxCache& layout, const pagetide::RowReader& rows) {
  std::string out;
  const absl::Status status =
      pagetide::WriteMlxCache(layout, rows, [&](absl::string_view part) -> absl::Status {
        FUZZ_CHECK(part.size() <= pagetide::kMaxSinkBytes);
        out.append(part.data(), part.size());
        return absl::OkStatus();
      });
  FUZZ_CHECK(status.ok());
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  if (in.Take<uint8_t>() % 2 == 1) {
    const auto layout = MlxCache::FromLayout(in.rest(), 4096);
    if (layout.ok()) FUZZ_CHECK(layout->layout() == in.rest());
    return 0;
  }
  const absl::string_view bytes = in.rest();
  const auto cache = MlxCache::Parse(bytes);
  if (!cache.ok()) return 0;
  const std::string once = Write(*cache, *cache);
  FUZZ_CHECK(once.size() == bytes.size());
  // Rows that are not used become zeros, so the first writing may differ from the input; the second
  // may not differ from the first.
  const auto again = MlxCache::Parse(once);
  FUZZ_CHECK(again.ok());
  FUZZ_CHECK(again->state() == cache->state());
  FUZZ_CHECK(Write(*again, *again) == once);
  const auto layout = MlxCache::FromLayout(cache->layout(), uint64_t{1} << 31);
  FUZZ_CHECK(layout.ok());
  FUZZ_CHECK(layout->state() == cache->state());
  return 0;
}
