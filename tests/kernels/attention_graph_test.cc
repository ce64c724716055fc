// Engines replay CUDA graphs over block tables that change between replays: one captured AttendCuda
// gives, over each table, the bits of a call made for it. Needs a GPU.
#include <cuda_runtime.h>

#include <cstring>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/convert.h"
#include "kernels/paged_attention.h"

namespace pagetide::kernels {
namespace {

constexpr int32_t kPageTokens = 16;
constexpr int32_t kPages = 8;
constexpr int32_t kMaxRuns = 40;  // room of the table
constexpr int32_t kHeads = 4;
constexpr int32_t kDim = 64;
constexpr int64_t kRowBytes = 2 * kDim;  // f16, one KV head

template <typename T>
T* Place(const std::vector<T>& values) {
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, values.size() * sizeof(T)), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
            cudaSuccess);
  return static_cast<T*>(memory);
}

TEST(AttentionGraphTest, AGraphIsReplayedOverTablesThatChange) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    GTEST_SKIP() << "no usable CUDA device: " << cudaGetErrorString(error);
  }
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> rows(size_t{kPages} * kPageTokens * 2 * kDim);
  for (uint16_t& x : rows) x = F32ToF16(normal(random));
  std::vector<float> q(size_t{kHeads} * kDim);
  for (float& x : q) x = normal(random);
  auto* const pages = reinterpret_cast<char*>(Place(rows));
  // Tables of 1 to kPages pages in any order; runs behind the last one are empty.
  const auto table = [&](int num_pages, int32_t last_count) {
    std::vector<KvRun> runs(kMaxRuns, KvRun{pages, pages, 0, 0, 0});
    for (int i = 0; i < num_pages; ++i) {
      char* const page =
          pages + static_cast<int64_t>(random() % kPages) * kPageTokens * 2 * kRowBytes;
      runs[static_cast<size_t>(i)] = {page, page + kPageTokens * kRowBytes,
                                      int64_t{i} * kPageTokens, 0,
                                      i + 1 < num_pages ? kPageTokens : last_count};
    }
    return runs;
  };
  KvRun* const runs = Place(table(1, 1));
  int64_t* const position = Place(std::vector<int64_t>{0});
  float* const out = Place(std::vector<float>(q.size()));

  AttentionBatch batch{};
  batch.all.shape = {kHeads,
                     1,
                     kDim,
                     kDim,
                     KvType::kF16,
                     KvType::kF16,
                     kRowBytes,
                     kRowBytes,
                     0.125f,
                     AttentionMask::kCausal,
                     1,
                     0};
  batch.all.runs = runs;
  batch.all.num_runs = kMaxRuns;
  batch.all.q = Place(q);
  batch.all.q_positions = position;
  batch.all.num_queries = 1;
  batch.all.out = out;
  batch.num_sequences = 1;
  batch.max_rows = int64_t{kMaxRuns} * kPageTokens;
  batch.max_queries = 1;
  ASSERT_STREQ(WhyNotAttendCuda(batch), nullptr);
  void* workspace = nullptr;
  ASSERT_EQ(cudaMalloc(&workspace, static_cast<size_t>(AttentionWorkspaceBytes(batch))),
            cudaSuccess);

  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_EQ(AttendCuda(batch, workspace, stream), cudaSuccess);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphExec_t replay = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);

  const auto answer = [&](auto&& launch) {
    std::vector<float> values(q.size(), -1.0f);
    EXPECT_EQ(cudaMemcpy(out, values.data(), values.size() * 4, cudaMemcpyHostToDevice),
              cudaSuccess);
    launch();
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(values.data(), out, values.size() * 4, cudaMemcpyDeviceToHost),
              cudaSuccess);
    return values;
  };
  for (int step = 1; step <= 20; ++step) {
    const int num_pages = 1 + step % kMaxRuns;
    const int32_t last_count = 1 + static_cast<int32_t>(random() % kPageTokens);
    const std::vector<KvRun> changed = table(num_pages, last_count);
    const int64_t at = int64_t{num_pages - 1} * kPageTokens + last_count - 1;
    ASSERT_EQ(
        cudaMemcpy(runs, changed.data(), changed.size() * sizeof(KvRun), cudaMemcpyHostToDevice),
        cudaSuccess);
    ASSERT_EQ(cudaMemcpy(position, &at, sizeof(at), cudaMemcpyHostToDevice), cudaSuccess);
    const std::vector<float> replayed =
        answer([&] { EXPECT_EQ(cudaGraphLaunch(replay, stream), cudaSuccess); });
    const std::vector<float> called =
        answer([&] { EXPECT_EQ(AttendCuda(batch, workspace, stream), cudaSuccess); });
    ASSERT_EQ(std::memcmp(replayed.data(), called.data(), called.size() * 4), 0) << step;
    // And the bits are those of an answer: the host's, within f16's bound.
    std::vector<float> want(q.size());
    std::vector<KvRun> host_runs = changed;
    for (KvRun& run : host_runs) {
      const auto to_host = [&](const void* p) {
        return reinterpret_cast<const char*>(rows.data()) + (static_cast<const char*>(p) - pages);
      };
      run.k_rows = to_host(run.k_rows);
      run.v_rows = to_host(run.v_rows);
    }
    AttentionArgs host = batch.all;
    host.runs = host_runs.data();
    host.q = q.data();
    host.q_positions = &at;
    host.out = want.data();
    AttendHost(host);
    for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(replayed[i], want[i], 0.02) << i;
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace pagetide::kernels
