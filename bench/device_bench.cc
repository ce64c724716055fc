// Speed of the CUDA kernels and of the CUDA device against what the GPU can do, measured in the
// same run. Prints one JSON line a figure.
//
//   device_bench [--repeats 9] [--mib 1024] [--pages-mib 512] [--sequences 64] [--rows 8192]
//
// "share" is what docs and the issue promise about:
//   kernels    bytes read plus written per second over those of a device-to-device cudaMemcpyAsync
//   attention  KV bytes read per second over the same
//   spill, restore   the device's Write and Read of pages from and to pinned memory, both ways at
//              once, over cudaMemcpyAsync of the same bytes on two streams both ways at once
// Each figure is the median of the repeats; the copy it is held against runs before each of them.
// Exits 1, saying why, where no GPU can be used.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "bench/seconds_now.h"
#include "kernels/convert_rows.h"
#include "kernels/copy_rows.h"
#include "kernels/page_move.h"
#include "kernels/paged_attention.h"
#include "kernels/rope_shift.h"
#include "nlohmann/json.hpp"
#include "worker/cuda_device.h"

namespace pagetide {
namespace {

using kernels::KvType;

constexpr KvType kAllTypes[] = {KvType::kF32,    KvType::kF16,  KvType::kBF16, KvType::kF8E4M3,
                                KvType::kF8E5M2, KvType::kQ8_0, KvType::kQ5_0, KvType::kQ5_1,
                                KvType::kQ4_0,   KvType::kQ4_1, KvType::kIQ4NL};

void Check(int error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "device_bench: %s: %s\n", what,
               cudaGetErrorString(static_cast<cudaError_t>(error)));
  std::exit(1);
}

// Device memory for the length of the run of one figure.
class DeviceMemory {
 public:
  explicit DeviceMemory(uint64_t num_bytes) : num_bytes_(num_bytes) {
    Check(cudaMalloc(&memory_, num_bytes), "allocate device memory");
  }
  ~DeviceMemory() { cudaFree(memory_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  char* get() const { return static_cast<char*>(memory_); }
  uint64_t size() const { return num_bytes_; }

 private:
  void* memory_ = nullptr;
  const uint64_t num_bytes_;
};

template <typename T>
std::unique_ptr<DeviceMemory> Upload(const std::vector<T>& values) {
  auto memory = std::make_unique<DeviceMemory>(values.size() * sizeof(T) + 1);
  Check(cudaMemcpy(memory->get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "upload");
  return memory;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Sizes {
  int repeats = 9;
  int64_t mib = 1024;
  int64_t pages_mib = 512;
  int64_t sequences = 64;
  int64_t rows = 8192;
};

class Bench {
 public:
  explicit Bench(const Sizes& sizes)
      : sizes_(sizes),
        from_(static_cast<uint64_t>(sizes.mib) << 20),
        to_(static_cast<uint64_t>(sizes.mib) << 20) {
    Check(cudaStreamCreate(&stream_), "create a stream");
    Check(cudaEventCreate(&begin_), "create an event");
    Check(cudaEventCreate(&end_), "create an event");
    Check(cudaMemset(from_.get(), 0x11, from_.size()), "fill");
    Check(cudaMemset(to_.get(), 0x11, to_.size()), "fill");
  }
  ~Bench() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }

  void PrintMachine() {
    cudaDeviceProp properties{};
    Check(cudaGetDeviceProperties(&properties, 0), "ask for the GPU");
    int driver = 0;
    Check(cudaDriverGetVersion(&driver), "ask for the driver");
    Print({{"figure", "machine"},
           {"gpu", properties.name},
           {"multiprocessors", properties.multiProcessorCount},
           {"driver_supports_cuda", driver},
           {"repeats", sizes_.repeats}});
  }

  void Copies() {
    Share({{"figure", "device copy"}}, 2 * from_.size(), [&] { return Copy(); });
    // 100 of 256 rows of 2 KiB in each of 32 layers, K and V: a partial page at a time.
    const int64_t layer_bytes = 2 * 256 * 2048;
    const int64_t page_bytes = 32 * layer_bytes;
    const int64_t num_pages = static_cast<int64_t>(from_.size()) / page_bytes;
    std::vector<kernels::CopyRun> runs;
    for (int64_t page = 0; page < num_pages; ++page) {
      for (const int64_t kind : {0, 256 * 2048}) {
        runs.push_back({from_.get() + page * page_bytes + kind + 7 * 2048,
                        to_.get() + page * page_bytes + kind, 100 * 2048});
      }
    }
    const auto device_runs = Upload(runs);
    const kernels::CopyRowsArgs copy{reinterpret_cast<const kernels::CopyRun*>(device_runs->get()),
                                     static_cast<int64_t>(runs.size()),
                                     32,
                                     layer_bytes,
                                     layer_bytes,
                                     100 * 2048};
    Share({{"figure", "row copy, 100 of 256"}}, 2 * num_pages * 64 * 100 * 2048,
          [&] { return CopyRowsCuda(copy, stream_); });

    // Pages and a layer-major pool by slots in random order, rows of 8 heads of 256 bytes.
    std::vector<int64_t> slots(static_cast<size_t>(num_pages * 256));
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
    std::shuffle(slots.begin(), slots.end(), std::mt19937(3));
    const auto device_slots = Upload(slots);
    for (const bool heads_first : {false, true}) {
      std::vector<kernels::EnginePlane> planes;
      for (int64_t p = 0; p < 64; ++p) {
        planes.push_back({to_.get() + p * num_pages * 256 * 2048, 16 * 2048,
                          heads_first ? 256 : 2048, heads_first ? 16 * 256 : 256, p * 256 * 2048});
      }
      std::vector<kernels::PageTokens> pages;
      for (int64_t page = 0; page < num_pages; ++page) {
        pages.push_back({from_.get() + page * page_bytes,
                         reinterpret_cast<const int64_t*>(device_slots->get()) + page * 256, 0,
                         256});
      }
      const auto device_planes = Upload(planes);
      const auto device_pages = Upload(pages);
      kernels::PageMoveArgs move{kernels::PageMoveDirection::kScatter,
                                 reinterpret_cast<kernels::EnginePlane*>(device_planes->get()),
                                 64,
                                 reinterpret_cast<kernels::PageTokens*>(device_pages->get()),
                                 num_pages,
                                 256,
                                 16,
                                 8,
                                 256};
      const char* layout = heads_first ? "HND" : "NHD";
      const int64_t moved = 2 * num_pages * page_bytes;
      Share({{"figure", "page scatter"}, {"layout", layout}}, moved,
            [&] { return PageMoveCuda(move, stream_); });
      move.direction = kernels::PageMoveDirection::kGather;
      Share({{"figure", "page gather"}, {"layout", layout}}, moved,
            [&] { return PageMoveCuda(move, stream_); });
    }
  }

  // Rows of 8 heads of 128 elements, as many as fill the buffer in f32.
  void ConversionsAndShifts() {
    constexpr int64_t kRow = 1024;
    const int64_t num_rows = static_cast<int64_t>(from_.size()) / 4 / kRow;
    for (const KvType type : kAllTypes) {
      const int64_t row_bytes = EncodedBytes(type, kRow);
      const int64_t moved = num_rows * (4 * kRow + row_bytes);
      if (type != KvType::kF32) {
        for (const bool quantise : {true, false}) {
          const std::vector<kernels::ConvertRun> runs = {{from_.get(), to_.get(), num_rows}};
          const auto device_runs = Upload(runs);
          const kernels::ConvertRowsArgs args{
              quantise ? KvType::kF32 : type,
              quantise ? type : KvType::kF32,
              kRow,
              quantise ? 4 * kRow : row_bytes,
              quantise ? row_bytes : 4 * kRow,
              reinterpret_cast<const kernels::ConvertRun*>(device_runs->get()),
              1,
              num_rows};
          Share({{"figure", quantise ? "quantise" : "dequantise"}, {"type", KvTypeName(type)}},
                moved, [&] { return ConvertRowsCuda(args, stream_); });
        }
      }
      kernels::RopeParams params;
      params.style = kernels::RopeStyle::kNeox;
      params.n_rot = 128;
      std::vector<float> angles(128);
      RopeAngles(params, -37, angles.data());
      const auto device_angles = Upload(angles);
      const std::vector<kernels::RopeShiftRun> runs = {{to_.get(), to_.get(), num_rows, -37}};
      const auto device_runs = Upload(runs);
      const kernels::RopeShiftArgs args{
          params,
          type,
          8,
          128,
          0,
          row_bytes,
          row_bytes,
          1,
          0,
          0,
          reinterpret_cast<const kernels::RopeShiftRun*>(device_runs->get()),
          1,
          num_rows,
          reinterpret_cast<const float*>(device_angles->get())};
      Share({{"figure", "rope shift"}, {"type", KvTypeName(type)}}, 2 * num_rows * row_bytes,
            [&] { return RopeShiftCuda(args, stream_); });
    }
  }

  // 32 query heads over 8 KV heads of 128; pages of 256 tokens in random order.
  void Decode(KvType type) {
    AttentionTimes(type, sizes_.sequences, sizes_.rows, 1, "decode attention");
  }
  void Prefill(KvType type) { AttentionTimes(type, 1, 4096, 4096, "prefill attention"); }

  // Pages in pinned and in pageable memory, both ways at once.
  void SpillAndRestore() {
    absl::StatusOr<std::unique_ptr<Device>> device = MakeCudaDevice(0);
    if (!device.ok()) Fail(device.status());
    const uint64_t total = static_cast<uint64_t>(sizes_.pages_mib) << 20;
    absl::StatusOr<std::unique_ptr<DevicePool>> made = (*device)->CreatePool(2 * total);
    if (!made.ok()) Fail(made.status());
    DevicePool& pool = **made;
    std::byte* pinned[2];
    std::vector<std::byte> pageable[2];
    cudaStream_t streams[2];
    for (int way = 0; way < 2; ++way) {
      void* memory = nullptr;
      Check(cudaMallocHost(&memory, total), "pin memory");
      pinned[way] = static_cast<std::byte*>(memory);
      std::fill_n(pinned[way], total, std::byte{1});
      pageable[way].assign(total, std::byte{1});
      Check(cudaStreamCreate(&streams[way]), "create a stream");
    }
    DeviceMemory bare(2 * total);
    for (const uint64_t page_mib : {2, 8, 32}) {
      const uint64_t page = page_mib << 20;
      const auto both_ways = [&](std::byte* in, std::byte* out) {
        const double begin = SecondsNow();
        absl::Status statuses[2];
        std::thread writer([&] {
          for (uint64_t at = 0; at < total && statuses[0].ok(); at += page) {
            statuses[0] = pool.Write(at, {in + at, page});
          }
        });
        for (uint64_t at = 0; at < total && statuses[1].ok(); at += page) {
          statuses[1] = pool.Read(total + at, {out + at, page});
        }
        writer.join();
        for (const absl::Status& status : statuses) {
          if (!status.ok()) Fail(status);
        }
        return SecondsNow() - begin;
      };
      std::vector<double> baseline, direct, staged;
      for (int i = 0; i < sizes_.repeats; ++i) {
        const double begin = SecondsNow();
        for (uint64_t at = 0; at < total; at += page) {
          Check(cudaMemcpyAsync(bare.get() + at, pinned[0] + at, page, cudaMemcpyHostToDevice,
                                streams[0]),
                "copy");
          Check(cudaMemcpyAsync(pinned[1] + at, bare.get() + total + at, page,
                                cudaMemcpyDeviceToHost, streams[1]),
                "copy");
        }
        for (cudaStream_t stream : streams) Check(cudaStreamSynchronize(stream), "wait");
        baseline.push_back(SecondsNow() - begin);
        direct.push_back(both_ways(pinned[0], pinned[1]));
        staged.push_back(both_ways(pageable[0].data(), pageable[1].data()));
      }
      for (const auto& [memory, seconds] :
           {std::pair{"pinned", Median(direct)}, {"pageable", Median(staged)}}) {
        Print({{"figure", "spill and restore at once"},
               {"memory", memory},
               {"page_mib", page_mib},
               {"gb_per_second", 2e-9 * static_cast<double>(total) / seconds},
               {"cudaMemcpyAsync_gb_per_second",
                2e-9 * static_cast<double>(total) / Median(baseline)},
               {"share", Median(baseline) / seconds}});
      }
    }
    for (int way = 0; way < 2; ++way) {
      cudaFreeHost(pinned[way]);
      cudaStreamDestroy(streams[way]);
    }
  }

 private:
  [[noreturn]] static void Fail(const absl::Status& status) {
    std::fprintf(stderr, "device_bench: %s\n", std::string(status.message()).c_str());
    std::exit(1);
  }
  static void Print(const nlohmann::ordered_json& figure) {
    std::printf("%s\n", figure.dump().c_str());
    std::fflush(stdout);
  }

  int Copy() {
    return cudaMemcpyAsync(to_.get(), from_.get(), from_.size(), cudaMemcpyDeviceToDevice, stream_);
  }
  double Seconds(const std::function<int()>& run) {
    Check(cudaEventRecord(begin_, stream_), "record");
    Check(run(), "launch");
    Check(cudaEventRecord(end_, stream_), "record");
    Check(cudaEventSynchronize(end_), "run");
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, begin_, end_), "time");
    return milliseconds * 1e-3;
  }

  // `bytes`: what one call of `run` counts for.
  void Share(nlohmann::ordered_json figure, uint64_t bytes, const std::function<int()>& run) {
    Seconds(run);  // the first one loads the code
    std::vector<double> copies, runs;
    for (int i = 0; i < sizes_.repeats; ++i) {
      copies.push_back(Seconds([&] { return Copy(); }));
      runs.push_back(Seconds(run));
    }
    const double copied = 2.0 * static_cast<double>(from_.size()) / Median(copies);
    const double moved = static_cast<double>(bytes) / Median(runs);
    figure["milliseconds"] = Median(runs) * 1e3;
    figure["gb_per_second"] = moved * 1e-9;
    figure["copy_gb_per_second"] = copied * 1e-9;
    figure["share"] = moved / copied;
    Print(figure);
  }

  void AttentionTimes(KvType type, int64_t sequences, int64_t rows, int64_t queries,
                      const char* figure) {
    constexpr int32_t kPageTokens = 256;
    constexpr int32_t kQueryHeads = 32;
    constexpr int32_t kKvHeads = 8;
    constexpr int32_t kDim = 128;
    const int64_t row_bytes = EncodedBytes(type, kKvHeads * kDim);
    const int64_t page_bytes = 2 * kPageTokens * row_bytes;
    const int64_t pages_each = (rows + kPageTokens - 1) / kPageTokens;
    const int64_t num_pages = sequences * pages_each;
    // Elements that are finite in every encoding: bytes of 0x11 are small numbers.
    DeviceMemory pool(static_cast<uint64_t>(num_pages * page_bytes));
    Check(cudaMemset(pool.get(), 0x11, pool.size()), "fill");
    std::vector<int64_t> order(static_cast<size_t>(num_pages));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    std::vector<kernels::KvRun> runs;
    std::vector<kernels::AttentionSequence> spans;
    std::vector<int64_t> positions;
    for (int64_t s = 0; s < sequences; ++s) {
      spans.push_back({s * pages_each, pages_each, s * queries, queries});
      for (int64_t p = 0; p < pages_each; ++p) {
        char* const page = pool.get() + order[static_cast<size_t>(s * pages_each + p)] * page_bytes;
        const int64_t first = p * kPageTokens;
        runs.push_back({page, page + kPageTokens * row_bytes, first, 0,
                        static_cast<int32_t>(std::min<int64_t>(kPageTokens, rows - first))});
      }
      for (int64_t q = 0; q < queries; ++q) positions.push_back(rows - queries + q);
    }
    std::mt19937 random(8);
    std::normal_distribution<float> normal;
    std::vector<float> q(static_cast<size_t>(sequences * queries * kQueryHeads * kDim));
    for (float& x : q) x = normal(random);
    const auto device_runs = Upload(runs);
    const auto device_spans = Upload(spans);
    const auto device_positions = Upload(positions);
    const auto device_q = Upload(q);
    DeviceMemory out(q.size() * sizeof(float));
    kernels::AttentionBatch batch{};
    batch.all.shape = {kQueryHeads,
                       kKvHeads,
                       kDim,
                       kDim,
                       type,
                       type,
                       row_bytes,
                       row_bytes,
                       1.0f / std::sqrt(static_cast<float>(kDim)),
                       kernels::AttentionMask::kCausal,
                       1,
                       0};
    batch.all.runs = reinterpret_cast<const kernels::KvRun*>(device_runs->get());
    batch.all.num_runs = static_cast<int64_t>(runs.size());
    batch.all.q = reinterpret_cast<const float*>(device_q->get());
    batch.all.q_positions = reinterpret_cast<const int64_t*>(device_positions->get());
    batch.all.num_queries = sequences * queries;
    batch.all.out = reinterpret_cast<float*>(out.get());
    batch.sequences = reinterpret_cast<const kernels::AttentionSequence*>(device_spans->get());
    batch.num_sequences = sequences;
    batch.max_rows = rows;
    batch.max_queries = queries;
    const int64_t workspace_bytes = AttentionWorkspaceBytes(batch);
    if (workspace_bytes < 0) {
      std::fprintf(stderr, "device_bench: %s\n", WhyNotAttendCuda(batch));
      std::exit(1);
    }
    DeviceMemory workspace(static_cast<uint64_t>(workspace_bytes) + 1);
    const auto run = [&] { return AttendCuda(batch, workspace.get(), stream_); };
    nlohmann::ordered_json what = {
        {"figure", figure},
        {"type", KvTypeName(type)},
        {"sequences", sequences},
        {"rows", rows},
        {"queries", queries},
        {"heads", std::to_string(kQueryHeads) + ":" + std::to_string(kKvHeads)},
        {"head_dim", kDim}};
    if (queries == 1) {
      Share(what, static_cast<uint64_t>(sequences * rows * 2 * row_bytes), run);
      return;
    }
    Seconds(run);
    std::vector<double> times;
    for (int i = 0; i < sizes_.repeats; ++i) times.push_back(Seconds(run));
    // Causal: half of the pairs, two products of kDim multiply-adds each.
    const double operations = 2.0 * static_cast<double>(sequences * queries) *
                              (static_cast<double>(rows) - static_cast<double>(queries) / 2) *
                              kQueryHeads * 2 * kDim;
    what["milliseconds"] = Median(times) * 1e3;
    what["tflop_per_second"] = operations / Median(times) * 1e-12;
    Print(what);
  }

  const Sizes sizes_;
  DeviceMemory from_, to_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  CLI::App app("Speed of the CUDA kernels and the CUDA device against the GPU's own copies");
  pagetide::Sizes sizes;
  app.add_option("--repeats", sizes.repeats, "of each measurement; the median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--mib", sizes.mib, "of each of two device buffers; larger than the L2 cache")
      ->check(CLI::Range(int64_t{64}, int64_t{32768}))
      ->capture_default_str();
  app.add_option("--pages-mib", sizes.pages_mib,
                 "spilled, and restored, a repeat; a multiple of 32")
      ->check(CLI::Range(int64_t{32}, int64_t{16384}))
      ->capture_default_str();
  app.add_option("--sequences", sizes.sequences, "of the decode step")
      ->check(CLI::Range(int64_t{1}, int64_t{4096}))
      ->capture_default_str();
  app.add_option("--rows", sizes.rows, "KV rows a sequence of the decode step")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  sizes.pages_mib = sizes.pages_mib / 32 * 32;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "device_bench: no usable GPU: %s\n", cudaGetErrorString(error));
    return 1;
  }
  pagetide::Bench bench(sizes);
  bench.PrintMachine();
  bench.Copies();
  bench.ConversionsAndShifts();
  for (const pagetide::KvType type :
       {pagetide::KvType::kF16, pagetide::KvType::kBF16, pagetide::KvType::kF8E4M3,
        pagetide::KvType::kQ8_0, pagetide::KvType::kQ4_0, pagetide::KvType::kF32}) {
    bench.Decode(type);
  }
  for (const pagetide::KvType type : {pagetide::KvType::kF16, pagetide::KvType::kBF16}) {
    bench.Prefill(type);
  }
  bench.SpillAndRestore();
  return 0;
}
