// Speed of the host twins against memcpy in the same run, and accuracy of the K-shift against
// float64. Prints two Markdown tables.
//
//   kernels_bench [--mib 64] [--repeats 7] [--rows 2048]
//
// Bytes per second count what a kernel reads plus what it writes, as for memcpy. Each figure is the
// best of the repeats; memcpy runs before every kernel, so that a noisy neighbour hits both. The
// exit status is 1 if a shift errs beyond its bound (docs/kshift.md derives the bounds).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "kernels/byte_planes.h"
#include "kernels/convert.h"
#include "kernels/copy_rows.h"
#include "kernels/page_move.h"
#include "kernels/rope_shift.h"

namespace pagetide::kernels {
namespace {

constexpr KvType kAllTypes[] = {KvType::kF32,    KvType::kF16,  KvType::kBF16, KvType::kF8E4M3,
                                KvType::kF8E5M2, KvType::kQ8_0, KvType::kQ5_0, KvType::kQ5_1,
                                KvType::kQ4_0,   KvType::kQ4_1, KvType::kIQ4NL};

std::vector<float> NormalValues(uint32_t seed, size_t count) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

class SpeedTable {
 public:
  SpeedTable(int64_t buffer_bytes, int repeats) : repeats_(repeats) {
    from_.assign(static_cast<size_t>(buffer_bytes), 1);
    to_.assign(static_cast<size_t>(buffer_bytes), 2);
    std::printf("| kernel | type | GB/s | memcpy GB/s | share |\n|---|---|---:|---:|---:|\n");
  }

  // moved_bytes: read plus written by one call of `run`.
  void Add(const char* kernel, const char* type, int64_t moved_bytes,
           const std::function<void()>& run) {
    double best = 0;
    double best_memcpy = 0;
    for (int i = 0; i < repeats_; ++i) {
      best_memcpy = std::max(best_memcpy, 2.0 * from_.size() / Seconds([&] {
                                            std::memcpy(to_.data(), from_.data(), from_.size());
                                          }));
      best = std::max(best, static_cast<double>(moved_bytes) / Seconds(run));
    }
    std::printf("| %s | %s | %.2f | %.2f | %.2f |\n", kernel, type, best / 1e9, best_memcpy / 1e9,
                best / best_memcpy);
  }

 private:
  static double Seconds(const std::function<void()>& run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  const int repeats_;
  std::vector<uint8_t> from_, to_;
};

void PrintSpeeds(int64_t mib, int repeats) {
  const int64_t bytes = mib << 20;
  SpeedTable table(bytes, repeats);

  // Rows of 8 heads of 128 elements, as many as fill the buffer in f32.
  const int64_t count = bytes / 4 / 1024 * 1024;
  std::vector<float> wide = NormalValues(1, static_cast<size_t>(count));
  std::vector<uint8_t> encoded(static_cast<size_t>(bytes));
  for (const KvType type : kAllTypes) {
    const int64_t size = EncodedBytes(type, count);
    const char* name = KvTypeName(type);
    table.Add("quantise from f32", name, 4 * count + size,
              [&] { NarrowFromF32(type, wide.data(), count, encoded.data()); });
    table.Add("dequantise to f32", name, 4 * count + size,
              [&] { WidenToF32(type, encoded.data(), count, wide.data()); });
  }
  for (const KvType type : kAllTypes) {
    NarrowFromF32(type, wide.data(), count, encoded.data());
    const int64_t row_bytes = EncodedBytes(type, 1024);
    for (const RopeStyle style : {RopeStyle::kNeox, RopeStyle::kNorm}) {
      RopeParams params;
      params.style = style;
      params.n_rot = 128;
      const RopeShiftRun run{encoded.data(), encoded.data(), count / 1024, -37};
      const RopeShiftArgs args{params, type, 8, 128,  0, row_bytes,    row_bytes,
                               1,      0,    0, &run, 1, run.num_rows, nullptr};
      const std::string kernel = style == RopeStyle::kNeox ? "shift, neox" : "shift, norm";
      table.Add(kernel.c_str(), KvTypeName(type), 2 * count / 1024 * row_bytes,
                [&] { RopeShiftHost(args); });
    }
  }

  std::vector<uint8_t> planes(static_cast<size_t>(bytes));
  for (const int32_t width : {2, 4, 34}) {
    const BytePlanesArgs split{encoded.data(), planes.data(), bytes / width, width};
    const BytePlanesArgs merge{planes.data(), encoded.data(), bytes / width, width};
    const std::string type = std::to_string(width) + " bytes";
    const int64_t moved = 2 * (bytes / width * width);
    table.Add("byte-plane split", type.c_str(), moved, [&] { SplitBytePlanesHost(split); });
    table.Add("byte-plane merge", type.c_str(), moved, [&] { MergeBytePlanesHost(merge); });
  }

  // 100 of 256 rows of 2 KiB in each of 32 layers, K and V: a partial page at a time.
  const int64_t layer_bytes = 2 * 256 * 2048;
  const int64_t page_bytes = 32 * layer_bytes;
  const int64_t num_pages = bytes / page_bytes;
  std::vector<CopyRun> runs;
  for (int64_t page = 0; page < num_pages; ++page) {
    for (const int64_t kind : {0, 256 * 2048}) {
      runs.push_back({encoded.data() + page * page_bytes + kind + 7 * 2048,
                      planes.data() + page * page_bytes + kind, 100 * 2048});
    }
  }
  const CopyRowsArgs copy{
      runs.data(), static_cast<int64_t>(runs.size()), 32, layer_bytes, layer_bytes, 100 * 2048};
  table.Add("row copy, 100 of 256", "2 KiB rows", 2 * num_pages * 64 * 100 * 2048,
            [&] { CopyRowsHost(copy); });

  // Pages to a layer-major pool by slots in random order, rows of 8 heads of 256 bytes.
  std::vector<int64_t> slots(static_cast<size_t>(num_pages * 256));
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), std::mt19937(3));
  for (const bool heads_first : {false, true}) {
    std::vector<EnginePlane> tensors;
    for (int64_t p = 0; p < 64; ++p) {
      tensors.push_back({planes.data() + p * num_pages * 256 * 2048, 16 * 2048,
                         heads_first ? 256 : 2048, heads_first ? 16 * 256 : 256, p * 256 * 2048});
    }
    std::vector<PageTokens> pages;
    for (int64_t page = 0; page < num_pages; ++page) {
      pages.push_back({encoded.data() + page * page_bytes, &slots[page * 256], 0, 256});
    }
    PageMoveArgs move{
        PageMoveDirection::kScatter, tensors.data(), 64, pages.data(), num_pages, 256, 16, 8, 256};
    const char* layout = heads_first ? "HND" : "NHD";
    table.Add("page scatter", layout, 2 * num_pages * page_bytes, [&] { PageMoveHost(move); });
    move.direction = PageMoveDirection::kGather;
    table.Add("page gather", layout, 2 * num_pages * page_bytes, [&] { PageMoveHost(move); });
  }
}

// Largest error of one encoding, as a share of the largest magnitude it encodes.
double EncodingBound(KvType type) {
  constexpr double kScale = 1.0 / 2048;  // of an f16 scale
  switch (type) {
    case KvType::kF32:
      return std::ldexp(1.0, -24);
    case KvType::kF16:
      return std::ldexp(1.0, -11);
    case KvType::kBF16:
      return std::ldexp(1.0, -8);
    case KvType::kF8E4M3:
      return std::ldexp(1.0, -4);
    case KvType::kF8E5M2:
      return std::ldexp(1.0, -3);
    case KvType::kQ8_0:
      return 0.5 / 127 + kScale;
    case KvType::kQ5_0:
      return 1.0 / 16 + kScale;
    case KvType::kQ5_1:
      return 1.0 / 31 + 3 * kScale;
    case KvType::kQ4_0:
      return 1.0 / 8 + kScale;
    case KvType::kQ4_1:
      return 1.0 / 15 + 3 * kScale;
    case KvType::kIQ4NL:
      return 14.0 / 127 + 14.0 / 113 + kScale;
  }
  return 0;
}

// RoPE in float64, norm or neox, over whole heads.
void TurnExactly(const RopeParams& params, double position, double* head) {
  const int half = params.n_rot / 2;
  const bool neox = params.style == RopeStyle::kNeox;
  for (int i = 0; i < half; ++i) {
    const double angle = position * std::pow(double{params.base}, -2.0 * i / params.n_rot);
    double& a = head[neox ? i : 2 * i];
    double& b = head[neox ? i + half : 2 * i + 1];
    const double turned = a * std::cos(angle) - b * std::sin(angle);
    b = a * std::sin(angle) + b * std::cos(angle);
    a = turned;
  }
}

struct ErrorStatistics {
  double largest = 0;
  double sum = 0;
  int64_t count = 0;
  void Add(double error) {
    largest = std::max(largest, error);
    sum += error;
    ++count;
  }
  double mean() const { return sum / static_cast<double>(count); }
};

// Errors as shares of the longest pair of a head, which no turn changes. True if all keep the
// bounds.
bool PrintAccuracy(int64_t num_rows) {
  constexpr int kHead = 128;
  constexpr int kShifts[] = {1, 10, 100};
  std::printf(
      "\n| type | written: max | mean | 1 shift: max | mean | bound | 10 shifts: max | mean | "
      "100 shifts: max | mean |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n");
  bool within = true;
  for (const KvType type : kAllTypes) {
    RopeParams params;
    params.style = RopeStyle::kNeox;
    params.n_rot = kHead;
    std::mt19937 random(11);
    std::normal_distribution<double> normal;
    ErrorStatistics written;
    ErrorStatistics shifted[3];
    const int64_t row_bytes = EncodedBytes(type, kHead);
    for (int64_t row = 0; row < num_rows; ++row) {
      std::vector<double> k(kHead);
      for (double& x : k) x = normal(random);
      double longest = 0;
      for (int i = 0; i < kHead / 2; ++i) {
        longest = std::max(longest, std::hypot(k[i], k[i + kHead / 2]));
      }
      const auto exact_at = [&](int64_t position) {
        std::vector<double> turned = k;
        TurnExactly(params, static_cast<double>(position), turned.data());
        return turned;
      };
      std::vector<uint8_t> encoded(static_cast<size_t>(row_bytes));
      const auto errors = [&](int64_t position, ErrorStatistics& statistics) {
        std::vector<float> decoded(kHead);
        WidenToF32(type, encoded.data(), kHead, decoded.data());
        const std::vector<double> exact = exact_at(position);
        for (int i = 0; i < kHead; ++i) {
          statistics.Add(std::abs(decoded[i] - exact[i]) / longest);
        }
      };
      int64_t position = static_cast<int64_t>(random() % 131072);
      const std::vector<double> start = exact_at(position);
      const std::vector<float> narrow(start.begin(), start.end());
      NarrowFromF32(type, narrow.data(), kHead, encoded.data());
      errors(position, written);
      int done = 0;
      for (int step = 0; step < 3; ++step) {
        for (; done < kShifts[step]; ++done) {
          const int64_t to = static_cast<int64_t>(random() % 131072);
          const RopeShiftRun run{encoded.data(), encoded.data(), 1, to - position};
          RopeShiftHost(
              {params, type, 1, kHead, 0, row_bytes, row_bytes, 1, 0, 0, &run, 1, 1, nullptr});
          position = to;
        }
        errors(position, shifted[step]);
      }
    }
    // An encoding error turns with its pair (up to sqrt 2 an element), and one more is added; the
    // last term is the turn's own f32 arithmetic.
    const double bound =
        (1 + std::sqrt(2.0)) * EncodingBound(type) * 1.01 + 8 * std::ldexp(1.0, -24);
    within = within && written.largest <= EncodingBound(type) * 1.01 + std::ldexp(1.0, -24) &&
             shifted[0].largest <= bound;
    std::printf("| %s | %.1e | %.1e | %.1e | %.1e | %.1e | %.1e | %.1e | %.1e | %.1e |\n",
                KvTypeName(type), written.largest, written.mean(), shifted[0].largest,
                shifted[0].mean(), bound, shifted[1].largest, shifted[1].mean(), shifted[2].largest,
                shifted[2].mean());
  }
  return within;
}

}  // namespace
}  // namespace pagetide::kernels

int main(int argc, char** argv) {
  CLI::App app("Speed of the host kernels against memcpy, and accuracy of the K-shift");
  int64_t mib = 64;
  int repeats = 7;
  int64_t rows = 2048;
  app.add_option("--mib", mib, "size of the buffers; larger than the last-level cache")
      ->check(CLI::Range(int64_t{32}, int64_t{4096}))
      ->capture_default_str();
  app.add_option("--repeats", repeats, "of each measurement, the best counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--rows", rows, "rows of 128 elements of the accuracy table")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  pagetide::kernels::PrintSpeeds(mib, repeats);
  if (!pagetide::kernels::PrintAccuracy(rows)) {
    std::fprintf(stderr, "kernels_bench: a K-shift errs beyond its bound\n");
    return 1;
  }
  return 0;
}
