// What every device keeps of the port worker/device.h: the CPU device always, CUDA where a GPU is,
// and in kernels_emulated_test the CUDA device over a runtime that runs on the CPU.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/convert.h"
#include "tests/worker/named_device.h"
#include "worker/cpu_device.h"
#include "worker/device.h"
#include "worker/device_addressed.h"
#include "worker/row_move.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

std::vector<std::byte> Pattern(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(n);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

class DeviceContractTest : public NamedDeviceTest {
 protected:
  std::unique_ptr<DevicePool> MakePool(uint64_t size_bytes) {
    auto pool = device_->CreatePool(size_bytes);
    EXPECT_TRUE(pool.ok()) << pool.status();
    return pool.ok() ? *std::move(pool) : nullptr;
  }
  static std::vector<std::byte> Contents(DevicePool& pool) {
    std::vector<std::byte> bytes(pool.size_bytes());
    EXPECT_TRUE(pool.Read(0, bytes).ok());
    return bytes;
  }
};

TEST_P(DeviceContractTest, APoolStartsZeroedAndOutlivesItsDevice) {
  EXPECT_THAT(std::string(device_->name()), StartsWith(GetParam() == "cpu" ? "cpu" : "cuda:"));
  auto pool = MakePool(5000);
  device_.reset();
  EXPECT_EQ(pool->size_bytes(), 5000u);
  EXPECT_EQ(Contents(*pool), std::vector<std::byte>(5000));
  // Only the CPU device's frames can be addressed, and mapped without anybody's leave.
  EXPECT_EQ(pool->host_view() != nullptr, GetParam() == "cpu");
  const PoolExport exported = pool->exported();
  if (GetParam() == "cpu") {
    EXPECT_EQ(exported.kind, PoolExport::Kind::kMemfd);
    EXPECT_GE(exported.fd, 0);
    EXPECT_EQ(exported.mapped_bytes, 5000u);
    EXPECT_EQ(exported.why_not, "");
  } else if (GetParam().find("exported") != std::string::npos) {
    EXPECT_EQ(exported.kind, PoolExport::Kind::kCudaVmm) << exported.why_not;
    EXPECT_GE(exported.fd, 0);
    EXPECT_GE(exported.mapped_bytes, 5000u);
    EXPECT_EQ(exported.device_uuid.size(), 16u);
  } else {
    EXPECT_EQ(exported.kind, PoolExport::Kind::kNone);
    EXPECT_EQ(exported.fd, -1);
    EXPECT_THAT(exported.why_not, HasSubstr("export_device_frames"));
  }
}

TEST_P(DeviceContractTest, RefusesSizesThatCannotBe) {
  EXPECT_EQ(device_->CreatePool(0).status().code(), absl::StatusCode::kInvalidArgument);
  const absl::Status status = device_->CreatePool(uint64_t{1} << 55).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat(uint64_t{1} << 55)));
  EXPECT_NE(MakePool(100), nullptr);  // a refusal leaves nothing behind
}

TEST_P(DeviceContractTest, RefusesRangesThatLeaveThePool) {
  auto pool = MakePool(1000);
  std::vector<std::byte> ten(10);
  const uint64_t huge = ~uint64_t{0};
  for (const uint64_t offset : {uint64_t{991}, uint64_t{1000}, uint64_t{1001}, huge, huge - 4}) {
    for (const absl::Status& status :
         {pool->Write(offset, ten), pool->Read(offset, ten), pool->Zero(offset, 10),
          pool->Copy(offset, 0, 10), pool->Copy(0, offset, 10)}) {
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat(offset)));
      EXPECT_THAT(std::string(status.message()), HasSubstr("1000"));
    }
  }
  EXPECT_FALSE(pool->Zero(1, huge).ok());
  EXPECT_FALSE(pool->Copy(1, 0, huge).ok());
  EXPECT_TRUE(pool->Write(990, ten).ok());
  EXPECT_TRUE(pool->Write(1000, {}).ok());
  EXPECT_TRUE(pool->Read(1000, {}).ok());
  EXPECT_TRUE(pool->Zero(1000, 0).ok());
  EXPECT_TRUE(pool->Copy(1000, 1000, 0).ok());
}

TEST_P(DeviceContractTest, AgreesWithAByteArray) {
  std::mt19937 random(11);
  auto pool = MakePool(4096);
  std::vector<std::byte> model(4096);
  for (int step = 0; step < 3000; ++step) {
    const size_t n = random() % 300;
    const size_t at = random() % (4096 - n);
    const size_t from = random() % (4096 - n);
    switch (random() % 4) {
      case 0: {
        const auto bytes = Pattern(n, static_cast<uint32_t>(random()));
        ASSERT_TRUE(pool->Write(at, bytes).ok());
        std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<ptrdiff_t>(at));
        break;
      }
      case 1: {  // ranges may overlap
        ASSERT_TRUE(pool->Copy(at, from, n).ok());
        std::memmove(&model[at], &model[from], n);
        break;
      }
      case 2:
        ASSERT_TRUE(pool->Zero(at, n).ok());
        std::fill_n(model.begin() + static_cast<ptrdiff_t>(at), n, std::byte{0});
        break;
      default: {
        std::vector<std::byte> read(n);
        ASSERT_TRUE(pool->Read(at, read).ok());
        ASSERT_EQ(std::memcmp(read.data(), &model[at], n), 0);
      }
    }
  }
  EXPECT_EQ(Contents(*pool), model);
}

// More than all pinned buffers of a call hold, from and to odd places.
TEST_P(DeviceContractTest, LongRangesComeWhole) {
  const size_t size = (size_t{13} << 20) + 77;
  auto pool = MakePool(size + 100);
  const auto bytes = Pattern(size, 3);
  ASSERT_TRUE(pool->Write(13, bytes).ok());
  std::vector<std::byte> read(size);
  ASSERT_TRUE(pool->Read(13, read).ok());
  EXPECT_EQ(read, bytes);
}

TEST_P(DeviceContractTest, CallsRunInParallelOnRangesThatDoNotOverlap) {
  constexpr size_t kRange = 300000;
  constexpr int kThreads = 7;  // more than a device serves at a time
  auto pool = MakePool(kRange * kThreads * 2);
  std::vector<std::thread> threads;
  std::vector<int> failures(kThreads, 0);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const uint64_t base = uint64_t{kRange} * 2 * static_cast<uint64_t>(t);
      for (uint32_t round = 0; round < 5; ++round) {
        const auto bytes = Pattern(kRange, static_cast<uint32_t>(t) * 100 + round);
        std::vector<std::byte> read(kRange);
        const bool ok = pool->Write(base, bytes).ok() &&
                        pool->Copy(base + kRange, base, kRange).ok() &&
                        pool->Zero(base, kRange).ok() && pool->Read(base + kRange, read).ok();
        if (!ok || read != bytes) ++failures[static_cast<size_t>(t)];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, std::vector<int>(kThreads, 0));
}

// --- rows between a pool and an engine's blocks, in memory of the same device ---

std::byte* AddressOf(DevicePool& pool) {
  auto* const device = dynamic_cast<DeviceAddressed*>(&pool);
  return device != nullptr ? static_cast<std::byte*>(device->device_address()) : pool.host_view();
}

TEST_P(DeviceContractTest, RowsGoToBlocksOfAnEngineAndBack) {
  struct Shape {
    int32_t block_tokens, num_heads;
    int64_t head_bytes;
    bool is_hnd;
  };
  std::mt19937 random(17);
  for (const Shape& shape :
       {Shape{16, 4, 32, false}, Shape{16, 4, 32, true}, Shape{1, 2, 34, false},
        Shape{5, 3, 7, true}, Shape{8, 1, 132, false}}) {
    SCOPED_TRACE(absl::StrCat("head of ", shape.head_bytes, " bytes"));
    constexpr int64_t kBlocks = 12;
    const int64_t row_bytes = shape.num_heads * shape.head_bytes;
    const int64_t block_bytes = shape.block_tokens * row_bytes + 24;  // and a gap between blocks
    const size_t engine_bytes = static_cast<size_t>(kBlocks * block_bytes + 40);
    auto engine = MakePool(engine_bytes);
    auto pool = MakePool(static_cast<uint64_t>(40 * row_bytes));
    std::vector<std::byte> blocks = Pattern(engine_bytes, 1);
    std::vector<std::byte> frames = Pattern(pool->size_bytes(), 2);
    std::vector<std::byte> host = Pattern(static_cast<size_t>(20 * row_bytes), 3);
    ASSERT_TRUE(engine->Write(0, blocks).ok());
    ASSERT_TRUE(pool->Write(0, frames).ok());
    RowMove move;
    move.plane.base = AddressOf(*engine) + 40;
    move.plane.engine_page_bytes = block_bytes;
    move.plane.engine_token_bytes = shape.is_hnd ? shape.head_bytes : row_bytes;
    move.plane.engine_head_bytes =
        shape.is_hnd ? shape.head_bytes * shape.block_tokens : shape.head_bytes;
    move.engine_page_tokens = shape.block_tokens;
    move.num_heads = shape.num_heads;
    move.head_bytes = shape.head_bytes;
    std::vector<int64_t> slots(static_cast<size_t>(kBlocks * shape.block_tokens));
    std::iota(slots.begin(), slots.end(), 0);
    for (int round = 0; round < 6; ++round) {
      std::shuffle(slots.begin(), slots.end(), random);
      const std::span<const int64_t> taken(slots);
      const std::vector<RowMove::Rows> runs = {
          {.pool_offset = static_cast<uint64_t>(3 * row_bytes), .slots = taken.first(5)},
          {.host = host.data() + row_bytes, .slots = taken.subspan(5, 4)},
          {.pool_offset = 0, .slots = {}},
          {.pool_offset = static_cast<uint64_t>(20 * row_bytes), .slots = taken.subspan(9, 2)},
          {.host = host.data() + 10 * row_bytes, .slots = taken.subspan(11, 1)}};
      move.runs = runs;
      const bool is_gather = round % 2 == 0;
      move.direction =
          is_gather ? kernels::PageMoveDirection::kGather : kernels::PageMoveDirection::kScatter;
      // What it should give, head by head.
      std::vector<std::byte> want_blocks = blocks, want_frames = frames, want_host = host;
      for (const RowMove::Rows& run : runs) {
        std::byte* rows = run.host != nullptr ? want_host.data() + (run.host - host.data())
                                              : want_frames.data() + run.pool_offset;
        for (const int64_t slot : run.slots) {
          for (int64_t h = 0; h < shape.num_heads; ++h, rows += shape.head_bytes) {
            std::byte* const place = want_blocks.data() + 40 +
                                     slot / shape.block_tokens * block_bytes +
                                     slot % shape.block_tokens * move.plane.engine_token_bytes +
                                     h * move.plane.engine_head_bytes;
            std::memcpy(is_gather ? rows : place, is_gather ? place : rows,
                        static_cast<size_t>(shape.head_bytes));
          }
        }
      }
      const absl::Status moved = pool->MoveRows(move);
      ASSERT_TRUE(moved.ok()) << moved;
      blocks = Contents(*engine);
      frames = Contents(*pool);
      ASSERT_EQ(blocks, want_blocks);
      ASSERT_EQ(frames, want_frames);
      ASSERT_EQ(host, want_host);
    }
    // What leaves the pool, or is no slot, moves nothing.
    const std::vector<int64_t> bad = {0, -1};
    const std::vector<int64_t> two = {0, 1};
    const std::vector<RowMove::Rows> wrong = {
        {.pool_offset = static_cast<uint64_t>(39 * row_bytes), .slots = two},
        {.pool_offset = ~uint64_t{0}, .slots = two},
        {.pool_offset = 0, .slots = bad},
        {.host = host.data(), .slots = bad}};
    for (const RowMove::Rows& run : wrong) {
      move.runs = {&run, 1};
      EXPECT_TRUE(absl::IsInvalidArgument(pool->MoveRows(move)));
    }
    EXPECT_EQ(Contents(*pool), frames);
    EXPECT_EQ(Contents(*engine), blocks);
  }
}

// --- attention and shifts: against the CPU device ---

struct Group {
  DataType k_type = DataType::kF16;
  DataType v_type = DataType::kF16;
  uint32_t kv_heads = 2;
  uint32_t k_dim = 32;
  uint32_t v_dim = 32;
  uint32_t n_rot = 32;
};

PageGeometry MakeGeometry(const Group& g) {
  GeometrySpec spec;
  spec.page_tokens = 16;
  LayerGroupSpec group;
  group.layers = {0, 1};
  group.k_type = g.k_type;
  group.v_type = g.v_type;
  group.kv_heads = g.kv_heads;
  group.k_dim = g.k_dim;
  group.v_dim = g.v_dim;
  group.rope.style = g.n_rot > 0 ? RopeSpec::Style::kNeox : RopeSpec::Style::kNone;
  group.rope.n_rot = g.n_rot;
  spec.groups = {group};
  return PageGeometry::Create(spec).value();
}

// Random rows in every slot of a pool of `num_pages`.
std::vector<std::byte> RandomPages(const GroupGeometry& group, uint32_t num_pages) {
  const LayerGroupSpec& spec = group.spec();
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<std::byte> bytes(group.page_bytes() * num_pages);
  const auto fill = [&](DataType type, uint32_t dim, uint64_t at) {
    std::vector<float> row(size_t{spec.kv_heads} * dim);
    for (float& x : row) x = normal(random);
    kernels::NarrowFromF32(static_cast<kernels::KvType>(static_cast<int>(type) - 1), row.data(),
                           static_cast<int64_t>(row.size()), &bytes[at]);
  };
  for (uint32_t page = 0; page < num_pages; ++page) {
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (uint32_t slot = 0; slot < group.page_tokens(); ++slot) {
        const uint64_t base = page * group.page_bytes();
        fill(spec.k_type, spec.k_dim, base + group.RowOffset(layer, RowKind::kK, slot));
        if (spec.v_dim == 0) continue;
        fill(spec.v_type, spec.v_dim, base + group.RowOffset(layer, RowKind::kV, slot));
      }
    }
  }
  return bytes;
}

struct Answer {
  absl::Status status;
  std::vector<float> outputs;
  std::vector<float> log_sum_exp;
};

Answer Ask(DevicePool& pool, const GroupGeometry& group, const std::vector<DeviceExtent>& extents,
           uint32_t num_queries, uint64_t first_position) {
  constexpr uint32_t kQueryHeads = 4;
  const uint32_t v_dim = group.spec().v_dim == 0 ? group.spec().k_dim / 2 : group.spec().v_dim;
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  std::vector<float> queries(size_t{num_queries} * kQueryHeads * group.spec().k_dim);
  for (float& q : queries) q = kernels::F16ToF32(kernels::F32ToF16(normal(random)));
  Answer answer;
  answer.outputs.assign(size_t{num_queries} * kQueryHeads * v_dim, NAN);
  answer.log_sum_exp.assign(size_t{num_queries} * kQueryHeads, NAN);
  AttentionCall call;
  call.group = &group;
  call.layer = 1;
  call.extents = extents;
  call.num_queries = num_queries;
  call.query_heads = kQueryHeads;
  call.first_position = first_position;
  call.queries = queries;
  call.outputs = std::span(answer.outputs);
  call.log_sum_exp = std::span(answer.log_sum_exp);
  answer.status = pool.Attend(call);
  return answer;
}

constexpr Group kGroups[] = {
    {},
    {.k_type = DataType::kF32, .v_type = DataType::kF32},
    {.k_type = DataType::kBF16, .v_type = DataType::kBF16, .kv_heads = 1},
    {.k_type = DataType::kQ8_0, .v_type = DataType::kQ4_0, .n_rot = 0},
    {.k_type = DataType::kF16, .kv_heads = 1, .k_dim = 48, .v_dim = 0, .n_rot = 16}};

TEST_P(DeviceContractTest, AttendsAsTheCpuDeviceDoes) {
  for (const Group& g : kGroups) {
    const PageGeometry geometry = MakeGeometry(g);
    const GroupGeometry& group = geometry.group(0);
    SCOPED_TRACE(absl::StrCat("type ", static_cast<int>(g.k_type), ", v_dim ", g.v_dim));
    const std::vector<std::byte> pages = RandomPages(group, 4);
    auto pool = MakePool(pages.size());
    auto oracle = CpuDevice().CreatePool(pages.size()).value();
    ASSERT_TRUE(pool->Write(0, pages).ok());
    ASSERT_TRUE(oracle->Write(0, pages).ok());
    // Pages in any order, extents that begin anywhere, some of them shifted.
    const uint64_t page = group.page_bytes();
    const std::vector<DeviceExtent> extents = {
        {.page_offset = 2 * page, .first_slot = 3, .count = 13, .first_position = 0},
        {.page_offset = 0, .first_slot = 0, .count = 16, .first_position = 13, .shift = 7},
        {.page_offset = 3 * page, .count = 0, .first_position = 29},
        {.page_offset = 3 * page, .first_slot = 1, .count = 5, .first_position = 29, .shift = -4}};
    for (const auto& [num_queries, first] : {std::pair{1u, 33u}, {9u, 25u}, {2u, 0u}, {0u, 0u}}) {
      const Answer got = Ask(*pool, group, extents, num_queries, first);
      const Answer want = Ask(*oracle, group, extents, num_queries, first);
      ASSERT_TRUE(want.status.ok()) << want.status;
      ASSERT_TRUE(got.status.ok()) << got.status;
      // kernels_contract_test holds the exact bounds; here rows must be the right ones.
      for (size_t i = 0; i < want.outputs.size(); ++i) {
        ASSERT_NEAR(got.outputs[i], want.outputs[i], 0.02) << i;
      }
      for (size_t i = 0; i < want.log_sum_exp.size(); ++i) {
        ASSERT_NEAR(got.log_sum_exp[i], want.log_sum_exp[i], 0.02) << i;
      }
    }
  }
}

TEST_P(DeviceContractTest, NoRowsGiveZerosAndMinusInfinity) {
  const PageGeometry geometry = MakeGeometry({});
  const GroupGeometry& group = geometry.group(0);
  auto pool = MakePool(group.page_bytes());
  const Answer answer = Ask(*pool, group, {}, 2, 5);
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  for (const float x : answer.outputs) EXPECT_EQ(x, 0.0f);
  for (const float x : answer.log_sum_exp) EXPECT_EQ(x, -std::numeric_limits<float>::infinity());
}

TEST_P(DeviceContractTest, RefusesWhatItCannotAttendTo) {
  const PageGeometry geometry = MakeGeometry({});
  const GroupGeometry& group = geometry.group(0);
  auto pool = MakePool(2 * group.page_bytes());
  const auto code = [&](const std::vector<DeviceExtent>& extents) {
    return Ask(*pool, group, extents, 1, 10).status.code();
  };
  EXPECT_EQ(code({{.page_offset = 0, .count = 16}}), absl::StatusCode::kOk);
  EXPECT_EQ(code({{.page_offset = 0, .first_slot = 1, .count = 16}}),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({{.page_offset = group.page_bytes() + 1, .count = 1}}),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({{.page_offset = 0, .count = 4, .first_position = 8},
                  {.page_offset = 0, .count = 4, .first_position = 3}}),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({{.page_offset = 0, .count = 4, .first_position = ~uint64_t{0}}}),
            absl::StatusCode::kInvalidArgument);
  // The pool works on.
  EXPECT_EQ(code({{.page_offset = group.page_bytes(), .count = 16}}), absl::StatusCode::kOk);
}

TEST_P(DeviceContractTest, ShiftedRowsHaveTheCpuDevicesBits) {
  for (const Group& g : kGroups) {
    const PageGeometry geometry = MakeGeometry(g);
    const GroupGeometry& group = geometry.group(0);
    SCOPED_TRACE(absl::StrCat("type ", static_cast<int>(g.k_type), ", v_dim ", g.v_dim));
    const std::vector<std::byte> pages = RandomPages(group, 1);
    auto pool = MakePool(pages.size());
    auto oracle = CpuDevice().CreatePool(pages.size()).value();
    ASSERT_TRUE(pool->Write(0, pages).ok());
    ASSERT_TRUE(oracle->Write(0, pages).ok());
    ASSERT_EQ(pool->CanShift(group), oracle->CanShift(group));
    const uint64_t offset = group.RowOffset(1, RowKind::kK, 2);
    for (const int32_t delta : {0, 1, -5, 4000}) {
      for (const uint32_t num_rows : {0u, 1u, 9u}) {
        std::vector<std::byte> got(uint64_t{num_rows} * group.k_row_bytes());
        std::vector<std::byte> want(got.size());
        const absl::Status status = pool->ReadShifted(group, offset, num_rows, delta, got);
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_TRUE(oracle->ReadShifted(group, offset, num_rows, delta, want).ok());
        ASSERT_EQ(got, want) << "delta " << delta << ", " << num_rows << " rows";
      }
    }
    std::vector<std::byte> short_of(group.k_row_bytes());
    EXPECT_FALSE(pool->ReadShifted(group, offset, 2, 1, short_of).ok());
    EXPECT_FALSE(pool->ReadShifted(group, pages.size(), 1, 1, short_of).ok());
    EXPECT_EQ(Contents(*pool), pages);  // frames stay as they were written
  }
}

#ifdef PAGETIDE_EMULATED_CUDA
INSTANTIATE_TEST_SUITE_P(Devices, DeviceContractTest,
                         testing::Values("cuda_emulated", "cuda_exported"),
#else
INSTANTIATE_TEST_SUITE_P(Devices, DeviceContractTest,
                         testing::Values("cpu", "cuda", "cuda_exported"),
#endif
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace pagetide
