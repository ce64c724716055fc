#include "worker/cpu_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/convert.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kPoolBytes = 1 << 16;

std::unique_ptr<DevicePool> MakePool(uint64_t size_bytes = kPoolBytes,
                                     CpuDevice::Options options = {}) {
  CpuDevice device(options);
  auto pool = device.CreatePool(size_bytes);
  EXPECT_TRUE(pool.ok()) << pool.status();
  return pool.ok() ? *std::move(pool) : nullptr;
}

std::vector<std::byte> Pattern(size_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<std::byte> bytes(n);
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
  return bytes;
}

std::vector<std::byte> Contents(DevicePool& pool) {
  std::vector<std::byte> bytes(pool.size_bytes());
  EXPECT_TRUE(pool.Read(0, bytes).ok());
  return bytes;
}

TEST(CpuDeviceTest, APoolStartsZeroed) {
  auto pool = MakePool(5000);
  EXPECT_EQ(CpuDevice().name(), "cpu");
  EXPECT_EQ(pool->size_bytes(), 5000u);
  ASSERT_NE(pool->host_view(), nullptr);
  EXPECT_EQ(Contents(*pool), std::vector<std::byte>(5000));
}

TEST(CpuDeviceTest, RefusesSizesThatCannotBe) {
  CpuDevice device;
  EXPECT_EQ(device.CreatePool(0).status().code(), absl::StatusCode::kInvalidArgument);
  for (uint64_t size : {uint64_t{1} << 55, ~uint64_t{0}}) {
    const absl::Status status = device.CreatePool(size).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat(size)));
  }
}

TEST(CpuDeviceTest, OptionsGiveAWorkingPool) {
  auto pool = MakePool(4 << 20, {.huge_pages = true, .reserve_memory = true});
  const auto bytes = Pattern(4 << 20, 1);
  ASSERT_TRUE(pool->Write(0, bytes).ok());
  EXPECT_EQ(Contents(*pool), bytes);
}

// What a local peer does with the descriptor that it is sent.
TEST(CpuDeviceTest, APeerSeesWritesAndCannotWrite) {
  auto pool = MakePool();
  const int fd = dup(pool->exported().fd);
  ASSERT_GE(fd, 0);
  void* view = mmap(nullptr, kPoolBytes, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(view, MAP_FAILED);
  const auto bytes = Pattern(100, 5);
  ASSERT_TRUE(pool->Write(kPoolBytes - 100, bytes).ok());
  EXPECT_EQ(std::memcmp(static_cast<std::byte*>(view) + kPoolBytes - 100, bytes.data(), 100), 0);

  errno = 0;
  EXPECT_EQ(mprotect(view, kPoolBytes, PROT_READ | PROT_WRITE), -1);
  EXPECT_EQ(errno, EACCES);
  errno = 0;
  EXPECT_EQ(mmap(nullptr, kPoolBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_EQ(errno, EPERM);
  errno = 0;
  EXPECT_EQ(pwrite(fd, "x", 1, 0), -1);
  EXPECT_EQ(errno, EPERM);
  errno = 0;
  EXPECT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
  EXPECT_EQ(errno, EPERM);
  for (off_t size : {off_t{0}, off_t{2 * kPoolBytes}}) {
    errno = 0;
    EXPECT_EQ(ftruncate(fd, size), -1);
    EXPECT_EQ(errno, EPERM);
  }
  errno = 0;
  EXPECT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
  EXPECT_EQ(errno, EPERM);

  // Opening the file anew gives no more right than the descriptor had.
  const int reopened = open(absl::StrCat("/proc/self/fd/", fd).c_str(), O_RDWR | O_CLOEXEC);
  if (reopened >= 0) {
    EXPECT_EQ(mmap(nullptr, kPoolBytes, PROT_READ | PROT_WRITE, MAP_SHARED, reopened, 0),
              MAP_FAILED);
    EXPECT_EQ(pwrite(reopened, "x", 1, 0), -1);
    close(reopened);
  }

  // The peer's mapping outlives the pool, as frames lent at a shutdown must.
  pool.reset();
  EXPECT_EQ(std::memcmp(static_cast<std::byte*>(view) + kPoolBytes - 100, bytes.data(), 100), 0);
  munmap(view, kPoolBytes);
  close(fd);
}

// A child of fork has the descriptor, but not the writable mapping.
TEST(CpuDeviceTest, AChildProcessDoesNotInheritTheWritableMapping) {
  auto pool = MakePool();
  std::byte* const base = pool->host_view();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // mincore fails with ENOMEM on addresses that are not mapped.
    unsigned char resident;
    _exit(mincore(base, 1, &resident) == -1 && errno == ENOMEM ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

// --- attention ---

struct AttendCase {
  const char* name;
  DataType k_type = DataType::kF32;
  DataType v_type = DataType::kF32;
  LayerGroupSpec::WindowType window_type = LayerGroupSpec::WindowType::kNone;
  uint32_t window_tokens = 0;
  uint32_t keep_tokens = 0;
  uint32_t kv_heads = 2;
  uint32_t k_dim = 8;
  uint32_t v_dim = 6;
};

void PrintTo(const AttendCase& c, std::ostream* os) {
  *os << c.name;
}

// The kernels list the same types from 0.
kernels::KvType KvTypeOf(DataType type) {
  return static_cast<kernels::KvType>(static_cast<int>(type) - 1);
}

PageGeometry MakeGeometry(const AttendCase& c, uint32_t page_tokens) {
  GeometrySpec spec;
  spec.page_tokens = page_tokens;
  LayerGroupSpec group;
  group.kind = c.window_tokens > 0 ? LayerGroupSpec::Kind::kWindow : LayerGroupSpec::Kind::kFull;
  group.window_type = c.window_type;
  group.window_tokens = c.window_tokens;
  group.keep_tokens = c.keep_tokens;
  group.layers = {0, 1, 2};
  group.k_type = c.k_type;
  group.v_type = c.v_type;
  group.kv_heads = c.kv_heads;
  group.k_dim = c.k_dim;
  group.v_dim = c.v_dim;
  spec.groups = {group};
  return PageGeometry::Create(spec).value();
}

// Rows of one layer: [num_rows, kv_heads, dim], the values as stored, and their encoding.
struct Rows {
  std::vector<float> k, v;
  std::vector<std::byte> k_bytes, v_bytes;
};

class CpuAttendTest : public testing::TestWithParam<AttendCase> {
 protected:
  static constexpr uint32_t kNumRows = 77;
  static constexpr uint32_t kQueryHeads = 4;
  static constexpr uint32_t kLayer = 1;

  Rows MakeRows() {
    const AttendCase& c = GetParam();
    Rows rows;
    Fill(c.k_type, c.k_dim, rows.k, rows.k_bytes);
    Fill(c.v_type, c.v_dim, rows.v, rows.v_bytes);
    return rows;
  }

  void Fill(DataType type, uint32_t dim, std::vector<float>& values,
            std::vector<std::byte>& bytes) {
    std::normal_distribution<float> normal;
    const uint32_t count = kNumRows * GetParam().kv_heads * dim;
    for (uint32_t i = 0; i < count; ++i) values.push_back(normal(rng_));
    bytes.resize(count / DataTypeGroupElements(type) * DataTypeGroupBytes(type));
    kernels::NarrowFromF32(KvTypeOf(type), values.data(), count, bytes.data());
    kernels::WidenToF32(KvTypeOf(type), bytes.data(), count, values.data());
  }

  // Writes the rows into frames in random order, `first_slot` of the first page left out, and
  // returns their extents.
  std::vector<DeviceExtent> Store(DevicePool& pool, const GroupGeometry& group, const Rows& rows,
                                  uint32_t first_slot) {
    const uint32_t page_tokens = group.page_tokens();
    const uint32_t num_pages = (first_slot + kNumRows + page_tokens - 1) / page_tokens;
    std::vector<uint64_t> frames(num_pages);
    for (uint32_t p = 0; p < num_pages; ++p) frames[p] = p;
    std::shuffle(frames.begin(), frames.end(), rng_);
    // Every byte that is not a row of this call is poison.
    EXPECT_TRUE(pool.Write(0, std::vector<std::byte>(pool.size_bytes(), std::byte{0x7f})).ok());
    std::vector<DeviceExtent> extents;
    for (uint32_t row = 0; row < kNumRows; ++row) {
      const uint32_t slot = (first_slot + row) % page_tokens;
      const uint64_t frame = frames[(first_slot + row) / page_tokens] * group.page_bytes();
      if (extents.empty() || slot == 0) {
        extents.push_back({.page_offset = frame, .first_slot = slot, .first_position = row});
      }
      ++extents.back().count;
      WriteRow(pool, frame + group.RowOffset(kLayer, RowKind::kK, slot), rows.k_bytes, row,
               group.k_row_bytes());
      WriteRow(pool, frame + group.RowOffset(kLayer, RowKind::kV, slot), rows.v_bytes, row,
               group.v_row_bytes());
    }
    return extents;
  }

  static void WriteRow(DevicePool& pool, uint64_t offset, std::span<const std::byte> rows,
                       uint32_t row, uint32_t row_bytes) {
    EXPECT_TRUE(pool.Write(offset, rows.subspan(uint64_t{row} * row_bytes, row_bytes)).ok());
  }

  static bool Sees(int64_t query, int64_t key) {
    const int64_t window = GetParam().window_tokens;
    switch (GetParam().window_type) {
      case LayerGroupSpec::WindowType::kNone:
        return key <= query;
      case LayerGroupSpec::WindowType::kStandard:
        return key <= query && query - key < window;
      case LayerGroupSpec::WindowType::kChunked:
        return key <= query && key >= query / window * window;
      case LayerGroupSpec::WindowType::kSymmetric:
        return std::abs(query - key) <= window / 2;
      case LayerGroupSpec::WindowType::kRing: {
        const int64_t keep = GetParam().keep_tokens;
        return key <= query && (key < keep || query - key < window - keep);
      }
    }
    return false;
  }

  std::mt19937 rng_{17};
};

TEST_P(CpuAttendTest, AgreesWithSoftmaxInDoubleOnEveryPaging) {
  const AttendCase& c = GetParam();
  const uint32_t out_dim = c.v_dim > 0 ? c.v_dim : c.k_dim - 3;  // latent: leading elements
  const Rows rows = MakeRows();
  const uint32_t num_queries = 9;
  const uint64_t first_position = kNumRows - num_queries;
  std::vector<float> queries(num_queries * kQueryHeads * c.k_dim);
  std::normal_distribution<float> normal;
  for (float& q : queries) q = normal(rng_);

  std::vector<double> want_out(num_queries * kQueryHeads * out_dim);
  std::vector<double> want_lse(num_queries * kQueryHeads);
  const double scale = 1 / std::sqrt(double{1} * c.k_dim);
  for (uint32_t i = 0; i < num_queries; ++i) {
    for (uint32_t h = 0; h < kQueryHeads; ++h) {
      const uint32_t kv = h / (kQueryHeads / c.kv_heads);
      double sum = 0;
      double* out = &want_out[(i * kQueryHeads + h) * out_dim];
      for (uint32_t row = 0; row < kNumRows; ++row) {
        if (!Sees(static_cast<int64_t>(first_position + i), row)) continue;
        const float* k = &rows.k[(row * c.kv_heads + kv) * c.k_dim];
        const float* v = c.v_dim == 0 ? k : &rows.v[(row * c.kv_heads + kv) * c.v_dim];
        double score = 0;
        for (uint32_t d = 0; d < c.k_dim; ++d) {
          score += double{queries[(i * kQueryHeads + h) * c.k_dim + d]} * k[d];
        }
        const double weight = std::exp(score * scale);
        sum += weight;
        for (uint32_t d = 0; d < out_dim; ++d) out[d] += weight * v[d];
      }
      for (uint32_t d = 0; d < out_dim; ++d) out[d] /= sum;
      want_lse[i * kQueryHeads + h] = std::log(sum);
    }
  }

  std::vector<float> first_outputs;
  for (uint32_t page_tokens : {4, 16, 64, 128}) {
    for (uint32_t first_slot : {0, 3}) {
      SCOPED_TRACE(absl::StrCat("page_tokens ", page_tokens, ", first slot ", first_slot));
      const PageGeometry geometry = MakeGeometry(c, page_tokens);
      const GroupGeometry& group = geometry.group(0);
      auto pool = MakePool(group.page_bytes() * (kNumRows / page_tokens + 2));
      const auto extents = Store(*pool, group, rows, first_slot);
      std::vector<float> outputs(want_out.size());
      std::vector<float> lse(want_lse.size());
      AttentionCall call;
      call.group = &group;
      call.layer = kLayer;
      call.extents = extents;
      call.num_queries = num_queries;
      call.query_heads = kQueryHeads;
      call.first_position = first_position;
      call.queries = queries;
      call.outputs = std::span(outputs);
      call.log_sum_exp = std::span(lse);
      const absl::Status status = pool->Attend(call);
      ASSERT_TRUE(status.ok()) << status;
      for (size_t i = 0; i < outputs.size(); ++i) ASSERT_NEAR(outputs[i], want_out[i], 2e-5) << i;
      for (size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(lse[i], want_lse[i], 2e-5) << i;
      if (first_outputs.empty()) first_outputs = outputs;
      EXPECT_EQ(outputs, first_outputs);  // no bit depends on the paging
      call.log_sum_exp = {};
      EXPECT_TRUE(pool->Attend(call).ok());
    }
  }
}

using Window = LayerGroupSpec::WindowType;
INSTANTIATE_TEST_SUITE_P(
    Types, CpuAttendTest,
    testing::Values(
        AttendCase{.name = "f32"},
        AttendCase{.name = "f16", .k_type = DataType::kF16, .v_type = DataType::kF16},
        AttendCase{.name = "bf16", .k_type = DataType::kBF16, .v_type = DataType::kBF16},
        AttendCase{.name = "f16_bf16", .k_type = DataType::kF16, .v_type = DataType::kBF16},
        AttendCase{.name = "f8", .k_type = DataType::kF8E4M3, .v_type = DataType::kF8E5M2},
        AttendCase{.name = "q8_0_q4_0",
                   .k_type = DataType::kQ8_0,
                   .v_type = DataType::kQ4_0,
                   .k_dim = 64,
                   .v_dim = 32},
        AttendCase{.name = "q5_1_iq4_nl",
                   .k_type = DataType::kQ5_1,
                   .v_type = DataType::kIQ4NL,
                   .k_dim = 32,
                   .v_dim = 96},
        AttendCase{.name = "mqa", .kv_heads = 1},
        AttendCase{.name = "latent", .k_type = DataType::kF16, .kv_heads = 1, .v_dim = 0},
        AttendCase{.name = "window", .window_type = Window::kStandard, .window_tokens = 20},
        AttendCase{.name = "chunked", .window_type = Window::kChunked, .window_tokens = 32},
        AttendCase{.name = "symmetric", .window_type = Window::kSymmetric, .window_tokens = 10},
        AttendCase{
            .name = "ring", .window_type = Window::kRing, .window_tokens = 20, .keep_tokens = 7}),
    [](const auto& info) { return std::string(info.param.name); });

// A small valid call that each test spoils in one place.
class CpuAttendRefusalTest : public testing::Test {
 protected:
  CpuAttendRefusalTest() { Use(AttendCase{.name = "f32"}); }

  void Use(const AttendCase& c) { Use(MakeGeometry(c, 4)); }
  void Use(PageGeometry geometry) {
    geometry_ = std::move(geometry);
    const GroupGeometry& group = geometry_.group(0);
    pool_ = MakePool(2 * group.page_bytes());
    extents_ = {{.page_offset = 0, .first_slot = 0, .count = 4, .first_position = 0},
                {.page_offset = group.page_bytes(), .count = 3, .first_position = 4}};
    queries_.assign(2 * 4 * group.spec().k_dim, 1.0f);
    outputs_.assign(2 * 4 * group.spec().v_dim, 0.0f);
    lse_.assign(2 * 4, 0.0f);
    call_ = {.group = &group,
             .layer = 0,
             .extents = {},
             .num_queries = 2,
             .query_heads = 4,
             .first_position = 5,
             .queries = queries_,
             .outputs = std::span(outputs_),
             .log_sum_exp = std::span(lse_)};
  }
  absl::Status Attend() {
    call_.extents = extents_;
    return pool_->Attend(call_);
  }
  void ExpectInvalid() {
    EXPECT_EQ(Attend().code(), absl::StatusCode::kInvalidArgument) << Attend();
  }
  void ExpectCannotAttend() {
    EXPECT_EQ(Attend().code(), absl::StatusCode::kFailedPrecondition) << Attend();
    EXPECT_EQ(GetReason(Attend()), "CANNOT_ATTEND");
  }

  PageGeometry geometry_;
  std::unique_ptr<DevicePool> pool_;
  std::vector<DeviceExtent> extents_;
  std::vector<float> queries_, outputs_, lse_;
  AttentionCall call_;
};

TEST_F(CpuAttendRefusalTest, TheUnspoiledCallWorks) {
  EXPECT_TRUE(Attend().ok()) << Attend();
}

TEST_F(CpuAttendRefusalTest, NoQueriesOrNoRowsIsNoError) {
  call_.num_queries = 0;
  call_.queries = {};
  call_.outputs = {};
  call_.log_sum_exp = {};
  EXPECT_TRUE(Attend().ok()) << Attend();
  Use(AttendCase{.name = "f32"});
  extents_.clear();
  ASSERT_TRUE(Attend().ok()) << Attend();
  for (float lse : lse_) EXPECT_EQ(lse, -std::numeric_limits<float>::infinity());
}

TEST_F(CpuAttendRefusalTest, RefusesWrongSizes) {
  call_.query_heads = 3;
  ExpectInvalid();
  call_.query_heads = 0;
  ExpectInvalid();
  call_.query_heads = 4;
  call_.layer = 3;
  ExpectInvalid();
  call_.layer = 2;
  call_.queries = call_.queries.first(call_.queries.size() - 1);
  ExpectInvalid();
  call_.queries = queries_;
  call_.outputs = call_.outputs.first(1);
  ExpectInvalid();
  call_.outputs = std::span(outputs_);
  call_.log_sum_exp = call_.log_sum_exp.first(7);
  ExpectInvalid();
  call_.log_sum_exp = std::span(lse_);
  call_.scale = std::numeric_limits<float>::infinity();
  ExpectInvalid();
  call_.scale = 0.5f;
  EXPECT_TRUE(Attend().ok());
  call_.group = nullptr;
  ExpectInvalid();
}

TEST_F(CpuAttendRefusalTest, RefusesExtentsOutsideTheirPageOrThePool) {
  extents_[1].count = 5;
  ExpectInvalid();
  extents_[1].count = std::numeric_limits<uint32_t>::max();
  extents_[1].first_slot = 2;
  ExpectInvalid();
  extents_[1] = {.page_offset = 2 * call_.group->page_bytes(), .count = 1, .first_position = 4};
  ExpectInvalid();
  extents_[1].page_offset = ~uint64_t{0};
  ExpectInvalid();
}

TEST_F(CpuAttendRefusalTest, RefusesPositionsOutOfOrderOrRange) {
  extents_[1].first_position = 2;
  ExpectInvalid();
  extents_[1].first_position = ~uint64_t{0};
  ExpectInvalid();
  extents_[1].first_position = 4;
  call_.first_position = ~uint64_t{0} - 1;
  ExpectInvalid();
}

TEST_F(CpuAttendRefusalTest, SaysWhatItCannotAttendTo) {
  GeometrySpec spec = geometry_.spec();
  spec.groups[0].v_type = DataType::kF32;
  spec.groups[0].basis = LayerGroupSpec::Basis::kHadamard;
  Use(PageGeometry::Create(spec).value());
  ExpectCannotAttend();
  spec.groups[0].basis = LayerGroupSpec::Basis::kPlain;
  spec.groups[0].scale = LayerGroupSpec::ScaleKind::kPerTokenAndHead;
  Use(PageGeometry::Create(spec).value());
  ExpectCannotAttend();
  spec.groups[0].scale = LayerGroupSpec::ScaleKind::kNone;
  spec.groups[0].packed_row_bytes = 100;
  Use(PageGeometry::Create(spec).value());
  ExpectCannotAttend();
}

TEST_F(CpuAttendRefusalTest, LatentOutputsAreNoWiderThanTheRows) {
  Use(AttendCase{.name = "latent", .kv_heads = 1, .v_dim = 0});
  outputs_.assign(2 * 4 * 8, 0.0f);
  call_.outputs = std::span(outputs_);
  EXPECT_TRUE(Attend().ok()) << Attend();
  outputs_.assign(2 * 4 * 9, 0.0f);
  call_.outputs = std::span(outputs_);
  ExpectInvalid();
  call_.outputs = {};
  ExpectInvalid();
}

}  // namespace
}  // namespace pagetide
