// What a layout, a slot map and a memory must be to be taken.
#include "worker/engine_layout.h"
#include "worker/cpu_device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

#include "base/error_info.h"
#include "tests/support/process.h"
#include "tests/worker/model_host_fixture.h"
#include "tests/worker/test_engine.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();

std::shared_ptr<const Model> HeadsModel() {
  ModelSpec spec = TestModel(8)->spec();
  spec.geometry.groups[0].kv_heads = 3;
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

struct BadLayout {
  const char* says;
  std::function<void(EnginePoolSpec&)> spoil;
};

TEST(EngineLayoutTest, RefusesWhatDoesNotFitAndNamesIt) {
  const auto model = HeadsModel();  // layers 0 and 2, K 3 × 8 × f32, V 3 × 4 × f32
  const TestEngine engine(model->geometry(), {.block_tokens = 4, .num_blocks = 8});
  const auto create = [&](const EnginePoolSpec& spec) {
    auto memories = engine.Registration("e").memories;
    return EngineLayout::Create(model->geometry(), spec, std::move(memories)).status();
  };
  ASSERT_TRUE(create(engine.spec()).ok()) << create(engine.spec());
  const auto first = [](EnginePoolSpec& spec) -> EnginePlaneSpec& {
    return spec.groups[0].layers[0].k;
  };
  const auto last = [](EnginePoolSpec& spec) -> EnginePlaneSpec& {
    return *spec.groups[0].layers[1].v;
  };
  const std::vector<BadLayout> bad = {
      {"block_tokens is 0", [](EnginePoolSpec& s) { s.block_tokens = 0; }},
      {"block_tokens is 65537", [](EnginePoolSpec& s) { s.block_tokens = 65537; }},
      {"num_blocks is 1", [](EnginePoolSpec& s) { s.num_blocks = 1; }},
      {"groups has 0 entries", [](EnginePoolSpec& s) { s.groups.clear(); }},
      {"groups[0].layers has 1 entries", [](EnginePoolSpec& s) { s.groups[0].layers.pop_back(); }},
      {"groups[0].kv_heads is 4", [](EnginePoolSpec& s) { s.groups[0].kv_heads = 4; }},
      {"K of f16", [](EnginePoolSpec& s) { s.groups[0].k_type = DataType::kF16; }},
      {"V of none", [](EnginePoolSpec& s) { s.groups[0].v_type.reset(); }},
      {"layers[1].v is absent", [](EnginePoolSpec& s) { s.groups[0].layers[1].v.reset(); }},
      {"layers[0].k.memory is 1", [&](EnginePoolSpec& s) { first(s).memory = 1; }},
      {"leaves memory 0", [&](EnginePoolSpec& s) { last(s).offset += 1; }},
      {"leaves memory 0", [&](EnginePoolSpec& s) { s.num_blocks += 1; }},
      {"leaves memory 0", [&](EnginePoolSpec& s) { first(s).offset = kMax; }},
      {"leaves memory 0", [&](EnginePoolSpec& s) { first(s).block_stride = kMax; }},
      {"leaves memory 0", [&](EnginePoolSpec& s) { first(s).block_stride = kMax / 7 + 1; }},
      {"leaves memory 0", [&](EnginePoolSpec& s) { s.num_blocks = 0xffffffff; }},
      {"block_stride", [&](EnginePoolSpec& s) { first(s).token_stride = kMax / 3 + 1; }},
      {"token_stride", [&](EnginePoolSpec& s) { first(s).head_stride = kMax / 2 + 1; }},
      {"head_stride is 31", [&](EnginePoolSpec& s) { first(s).head_stride = 31; }},
      {"token_stride is 95", [&](EnginePoolSpec& s) { first(s).token_stride = 95; }},
      {"block_stride is 383", [&](EnginePoolSpec& s) { first(s).block_stride = 383; }},
      {"token_stride is 31",
       [&](EnginePoolSpec& s) {
         s.groups[0].heads = EngineHeads::kHnd;
         first(s).token_stride = 31;
       }},
      {"head_stride is 127",
       [&](EnginePoolSpec& s) {
         s.groups[0].heads = EngineHeads::kHnd;
         first(s).head_stride = 127;
       }},
  };
  for (const BadLayout& layout : bad) {
    EnginePoolSpec spec = engine.spec();
    layout.spoil(spec);
    const absl::Status status = create(spec);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << layout.says;
    EXPECT_THAT(std::string(status.message()), HasSubstr(layout.says));
  }
}

TEST(EngineLayoutTest, AModelWithGroupsWithoutRowsIsRefused) {
  const auto model = MixedModel(8, 4, 2);
  EnginePoolSpec spec;
  spec.block_tokens = 4;
  spec.num_blocks = 4;
  const TestEngine engine(TestModel(8)->geometry(), {});
  spec.groups.assign(model->geometry().num_groups(), {});
  // Of the groups with rows all is well.
  for (uint32_t g = 0; g < 2; ++g) {
    spec.groups[g] = engine.spec().groups[0];
    spec.groups[g].layers.resize(model->geometry().group(g).num_layers());
  }
  const auto layout =
      EngineLayout::Create(model->geometry(), spec, engine.Registration("e").memories);
  EXPECT_EQ(layout.status().code(), absl::StatusCode::kFailedPrecondition) << layout.status();
  EXPECT_EQ(GetReason(layout.status()), "NO_ROWS");
}

TEST(EngineLayoutTest, SlotMapsNameEachBlockOnceAndNeverTheNullBlock) {
  const auto model = HeadsModel();
  const TestEngine engine(model->geometry(), {.block_tokens = 4, .num_blocks = 8});
  const auto layout =
      EngineLayout::Create(model->geometry(), engine.spec(), engine.Registration("e").memories);
  ASSERT_TRUE(layout.ok()) << layout.status();
  const auto check = [&](std::vector<EngineSlotMap> maps, uint64_t num_tokens) {
    return layout->CheckMaps(maps, num_tokens);
  };
  EXPECT_TRUE(check({{0, {1, 7, 2}}}, 12).ok());
  EXPECT_TRUE(check({{0, {1, 7, 2}}}, 9).ok());
  EXPECT_TRUE(check({{3, {1, 7, 2}}}, 9).ok());
  EXPECT_TRUE(check({{4, {7, 2}}}, 9).ok());
  EXPECT_TRUE(check({{9, {}}}, 9).ok());
  const std::vector<std::pair<std::vector<EngineSlotMap>, std::string>> bad = {
      {{}, "slot_maps has 0 entries"},
      {{{0, {1, 2, 3}}, {0, {4, 5, 6}}}, "slot_maps has 2 entries"},
      {{{0, {1, 2}}}, "need 3"},
      {{{0, {1, 2, 3, 4}}}, "need 3"},
      {{{0, {1, 0, 2}}}, "blocks[1] is 0"},
      {{{0, {1, 2, 8}}}, "blocks[2] is 8, must be 1 to 7"},
      {{{0, {0xffffffff, 2, 3}}}, "blocks[0] is 4294967295"},
      {{{0, {5, 2, 5}}}, "names block 5 twice"},
      {{{13, {}}}, "first_token is 13"},
      {{{kMax, {}}}, "first_token"},
  };
  for (const auto& [maps, says] : bad) {
    const absl::Status status = layout->CheckMaps(maps, 12);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << says;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says));
  }
  EXPECT_THAT(layout->Slots({3, {1, 7, 2}}, 3, 9), ::testing::ElementsAre(7, 28, 29, 30, 31, 8));
}

TEST(EngineLayoutTest, RowsWithScalesAndPackedRowsMoveAsAWhole) {
  ModelSpec scaled = HeadsModel()->spec();
  scaled.geometry.groups[0].scale = LayerGroupSpec::ScaleKind::kPerTokenAndHead;
  ModelSpec packed = TestModel(8)->spec();
  packed.geometry.groups[0] = {.layers = {0, 1}, .packed_row_bytes = 100};
  for (const ModelSpec& model_spec : {scaled, packed}) {
    const auto model = Model::Create(model_spec);
    ASSERT_TRUE(model.ok()) << model.status();
    const GroupGeometry& group = model->geometry().group(0);
    const bool has_v = group.v_row_bytes() > 0;
    EXPECT_EQ(group.k_row_bytes(), has_v ? 3 * 8 * 4 + 3 * 4 : 100);
    EnginePoolSpec spec{.block_tokens = 4, .num_blocks = 4, .groups = {}};
    EngineGroupSpec& engine = spec.groups.emplace_back();
    if (has_v) engine.k_type = engine.v_type = DataType::kF32;
    engine.kv_heads = has_v ? 3 : 1;
    uint64_t at = 0;
    for (int layer = 0; layer < 2; ++layer) {
      EngineGroupSpec::Layer& planes = engine.layers.emplace_back();
      planes.k.offset = at;
      at += 16 * group.k_row_bytes();
      if (has_v) planes.v.emplace().offset = at;
      at += 16 * group.v_row_bytes();
    }
    const int fd = MakeEngineFd(at);
    const auto memory = EngineMemory::Map(fd, at);
    close(fd);
    ASSERT_TRUE(memory.ok()) << memory.status();
    const auto layout = EngineLayout::Create(model->geometry(), spec, {*memory});
    ASSERT_TRUE(layout.ok()) << layout.status();
    const auto pool = CpuDevice().CreatePool(4096).value();
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      const uint32_t row_bytes = group.row_bytes(kind);
      std::vector<std::byte> rows = RowOracle::Rows(Tokens(1, 3), 0, 3, 0, 1, kind, row_bytes);
      const std::vector<int64_t> slots = {15, 4, 6};
      const EngineLayout::Rows run{.host = rows.data(), .slots = slots};
      const absl::Status moved =
          layout->Move(EngineLayout::Direction::kToEngine, 0, 1, kind, {&run, 1}, pool.get());
      ASSERT_TRUE(moved.ok()) << moved;
      const auto& planes = engine.layers[1];
      if (row_bytes == 0) continue;
      const uint64_t offset = kind == RowKind::kK ? planes.k.offset : planes.v->offset;
      for (size_t i = 0; i < slots.size(); ++i) {
        EXPECT_EQ(std::memcmp((*memory)->data() + offset + slots[i] * row_bytes,
                              rows.data() + i * row_bytes, row_bytes),
                  0);
      }
    }
    engine.heads = EngineHeads::kHnd;
    const auto apart = EngineLayout::Create(model->geometry(), spec, {*memory});
    // The scales of three heads stand behind them all; of one head nothing can lie apart.
    EXPECT_EQ(apart.status().code(),
              has_v ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kOk)
        << apart.status();
  }
}

TEST(EngineMemoryTest, TakesOnlyMemoryThatCannotShrinkUnderTheWorker) {
  const auto code = [](int fd, uint64_t size) {
    const auto memory = EngineMemory::Map(fd, size);
    close(fd);
    return memory.status().code();
  };
  EXPECT_EQ(code(MakeEngineFd(8192), 8192), absl::StatusCode::kOk);
  EXPECT_EQ(code(MakeEngineFd(8192), 100), absl::StatusCode::kOk);
  EXPECT_EQ(code(MakeEngineFd(8192, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 8192),
            absl::StatusCode::kOk);
  EXPECT_EQ(code(MakeEngineFd(8192), 8193), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(MakeEngineFd(8192), 0), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(MakeEngineFd(8192), kMax), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(MakeEngineFd(8192, 0), 8192), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(MakeEngineFd(8192, F_SEAL_GROW), 8192), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(MakeEngineFd(8192, F_SEAL_SHRINK | F_SEAL_WRITE), 8192),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(MakeEngineFd(8192, F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE), 8192),
            absl::StatusCode::kFailedPrecondition);
  // No memfd: a file, a pipe; and none opened for writing.
  const testing::TempDir dir;
  const int file = open((dir / "file").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  ASSERT_EQ(ftruncate(file, 8192), 0);
  EXPECT_EQ(code(file, 8192), absl::StatusCode::kFailedPrecondition);
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  EXPECT_EQ(code(ends[0], 1), absl::StatusCode::kFailedPrecondition);
  close(ends[1]);
  const int folder = open(dir.path().c_str(), O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(code(folder, 1), absl::StatusCode::kFailedPrecondition);
  const int path = open(dir.path().c_str(), O_PATH | O_CLOEXEC);
  EXPECT_EQ(code(path, 1), absl::StatusCode::kFailedPrecondition);
  const int writable = MakeEngineFd(8192);
  const int read_only =
      open(("/proc/self/fd/" + std::to_string(writable)).c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_GE(read_only, 0);
  EXPECT_EQ(code(read_only, 8192), absl::StatusCode::kFailedPrecondition);
  close(writable);
  EXPECT_EQ(code(-1, 8192), absl::StatusCode::kFailedPrecondition);
}

TEST(EngineMemoryTest, KnowsItsHoles) {
  const auto map = [](int fd) {
    auto memory = EngineMemory::Map(fd, 5 * 4096);
    EXPECT_TRUE(memory.ok()) << memory.status();
    return *std::move(memory);
  };
  const int fd = MakeEngineFd(5 * 4096);
  const auto memory = map(fd);
  EXPECT_THAT(std::string(memory->CheckAllocated().message()),
              HasSubstr("behind byte 0: 0 of its 20480 bytes are allocated"));
  for (int page = 0; page < 4; ++page) memory->data()[page * 4096] = std::byte{1};
  EXPECT_TRUE(absl::IsInvalidArgument(memory->CheckAllocated()));
  EXPECT_THAT(std::string(memory->CheckAllocated().message()),
              HasSubstr("behind byte 16384: 16384"));
  memory->data()[4 * 4096] = std::byte{1};
  EXPECT_TRUE(memory->CheckAllocated().ok()) << memory->CheckAllocated();
  // Made later: seen by who looks again.
  ASSERT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 4096), 0);
  EXPECT_THAT(std::string(memory->CheckAllocated().message()),
              HasSubstr("behind byte 4096: 16384"));
  close(fd);
  // Allocated and never touched.
  const int allocated = MakeEngineFd(5 * 4096);
  ASSERT_EQ(posix_fallocate(allocated, 0, 5 * 4096), 0);
  EXPECT_TRUE(map(allocated)->CheckAllocated().ok());
  close(allocated);
}

TEST(EngineMemoryTest, OutlivesTheDescriptorAndStaysWhole) {
  const int fd = MakeEngineFd(8192);
  const auto memory = EngineMemory::Map(fd, 8192);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_NE(ftruncate(fd, 4096), 0);  // the seal
  // Holes are zeros.
  ASSERT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 8192), 0);
  close(fd);
  EXPECT_EQ((*memory)->data()[8191], std::byte{0});
}

}  // namespace
}  // namespace pagetide
