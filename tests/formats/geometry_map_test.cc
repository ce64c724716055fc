#include "formats/geometry_map.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <string>

#include "base/error_info.h"
#include "tests/formats/format_test_util.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

LayerGroupSpec Group(std::vector<uint32_t> layers, uint32_t k_dim = 4) {
  LayerGroupSpec group;
  group.layers = std::move(layers);
  group.kv_heads = 1;
  group.k_dim = k_dim;
  group.v_dim = 4;
  return group;
}
LayerGroupSpec Window(std::vector<uint32_t> layers, LayerGroupSpec::WindowType type, uint32_t w) {
  LayerGroupSpec group = Group(std::move(layers));
  group.kind = LayerGroupSpec::Kind::kWindow;
  group.window_type = type;
  group.window_tokens = w;
  return group;
}
PageGeometry Geometry(std::vector<LayerGroupSpec> groups) {
  GeometrySpec spec;
  spec.page_tokens = 4;
  spec.groups = std::move(groups);
  return PageGeometry::Create(std::move(spec)).value();
}

RowBlock Block(uint32_t rows, const std::vector<uint64_t>& k_bytes) {
  RowBlock block;
  block.positions.resize(rows);
  std::iota(block.positions.begin(), block.positions.end(), 0);
  for (uint32_t l = 0; l < k_bytes.size(); ++l) {
    block.layers.push_back({{DataType::kF16, k_bytes[l]}, {DataType::kF16, 8}, l});
  }
  return block;
}

TEST(GeometryMapTest, LayersOfSeveralGroupsAreFoundByNumber) {
  // Groups by K width; the state has the layers in the model's order.
  const PageGeometry geometry = Geometry({Group({0, 2}), Group({1}, 8)});
  SequenceState state;
  state.blocks = {Block(5, {8, 16, 8})};
  const MemoryRows rows(&state, 3);
  for (const BlockRule rule : {BlockRule::kByKind, BlockRule::kByNumber}) {
    const auto map = StateMap::Create(&state, rule, geometry, 5);
    ASSERT_TRUE(map.ok()) << map.status();
    std::string out(2 * 8, '\0');
    const auto read = [&](uint32_t group, uint32_t layer) {
      EXPECT_TRUE(map->ReadRows(rows, group, layer, RowKind::kV, 1, 2,
                                {reinterpret_cast<std::byte*>(out.data()), out.size()})
                      .ok());
      return out;
    };
    EXPECT_EQ(read(0, 1), rows.Of(0, 2, RowKind::kV).substr(8, 16));
    EXPECT_EQ(read(1, 0), rows.Of(0, 1, RowKind::kV).substr(8, 16));
  }
}

TEST(GeometryMapTest, RowsInAnyOrderAreReadByPosition) {
  const PageGeometry geometry = Geometry({Group({0})});
  SequenceState state;
  state.blocks = {Block(4, {8})};
  state.blocks[0].positions = {2, 3, 0, 1};
  const MemoryRows rows(&state, 3);
  const auto map = StateMap::Create(&state, BlockRule::kByKind, geometry, 4);
  ASSERT_TRUE(map.ok()) << map.status();
  std::string out(4 * 8, '\0');
  ASSERT_TRUE(map->ReadRows(rows, 0, 0, RowKind::kK, 0, 4,
                            {reinterpret_cast<std::byte*>(out.data()), out.size()})
                  .ok());
  const std::string& all = rows.Of(0, 0, RowKind::kK);
  EXPECT_EQ(out, all.substr(16) + all.substr(0, 16));
}

TEST(GeometryMapTest, MissingRepeatedAndStrayPositionsAreRefused) {
  const PageGeometry geometry = Geometry({Group({0})});
  for (const std::vector<uint32_t>& positions : std::vector<std::vector<uint32_t>>{
           {0, 1, 2}, {1, 2, 3}, {0, 1, 1, 3}, {0, 1, 2, 4}, {0, 1, 2, ~0u}}) {
    SequenceState state;
    state.blocks = {Block(4, {8})};
    state.blocks[0].positions = positions;
    const auto map = StateMap::Create(&state, BlockRule::kByKind, geometry, 4);
    EXPECT_EQ(GetReason(map.status()), "MODEL_MISMATCH") << map.status();
  }
}

TEST(GeometryMapTest, StatesForLlamaCppHaveTheRowsOfTheMask) {
  using Type = LayerGroupSpec::WindowType;
  const std::vector<uint32_t> tokens(10, 1);
  // FEATURES C2: W = 4, tokens 0 to 9. The format keeps what the newest token may attend to.
  const std::pair<Type, std::vector<uint32_t>> cases[] = {
      {Type::kStandard, {6, 7, 8, 9}}, {Type::kChunked, {8, 9}}, {Type::kSymmetric, {7, 8, 9}}};
  for (const auto& [type, kept] : cases) {
    const std::vector<std::vector<RowSpan>> all(2, {{0, 10}});
    const PageGeometry geometry = Geometry({Group({1}), Window({0, 2}, type, 4)});
    const auto described = DescribeForLlamaCpp(geometry, tokens, all);
    ASSERT_TRUE(described.ok()) << described.status();
    ASSERT_EQ(described->state.blocks.size(), 2);
    EXPECT_EQ(described->state.blocks[0].positions.size(), 10);
    EXPECT_EQ(described->state.blocks[1].positions, kept);
    EXPECT_EQ(described->places[1][1].group, 1);
    EXPECT_EQ(described->places[1][1].layer, 1);
  }
}

TEST(GeometryMapTest, TheWindowOfARealStateHasTheRowsThatTheNextTokenSees) {
  // As testdata/make_llama_cpp_states.py: every sixth layer is full, the window is 8.
  LayerGroupSpec full = Group({5}, 32);
  LayerGroupSpec window = Window({0, 1, 2, 3, 4}, LayerGroupSpec::WindowType::kStandard, 8);
  full.v_dim = window.k_dim = window.v_dim = 32;
  const PageGeometry geometry = Geometry({full, window});
  const std::string file = TestFile("llama_cpp_v2_iswa.ggsq");
  const auto state = LlamaCppState::Parse(file, LlamaCppHintsFor(geometry, 2));
  ASSERT_TRUE(state.ok()) << state.status();
  const auto map = StateMap::Create(&state->state(), BlockRule::kByKind, geometry, 20);
  ASSERT_TRUE(map.ok()) << map.status();
  EXPECT_THAT(map->held()[0], ElementsAre(RowSpan{0, 20}));
  EXPECT_THAT(map->held()[1], ElementsAre(RowSpan{12, 20}));
  // What the state lacks reads as zeros.
  std::string rows(3 * 64, 'x');
  ASSERT_TRUE(map->ReadRows(*state, 1, 0, RowKind::kK, 10, 3,
                            {reinterpret_cast<std::byte*>(rows.data()), rows.size()})
                  .ok());
  EXPECT_EQ(rows.substr(0, 128), std::string(128, '\0'));
  EXPECT_EQ(rows.substr(128), ReadAll(*state, state->state(), 1, 0, RowKind::kK).substr(0, 64));
  // Of a wider window rows are missing.
  window.window_tokens = 16;
  const PageGeometry wider = Geometry({full, window});
  const auto lacks = StateMap::Create(&state->state(), BlockRule::kByKind, wider, 20);
  EXPECT_EQ(GetReason(lacks.status()), "MODEL_MISMATCH");
  EXPECT_THAT(std::string(lacks.status().message()), HasSubstr("rows that a window dropped"));
  // What we describe for such a model is what llama.cpp wrote.
  const std::vector<std::vector<RowSpan>> all(2, {{0, 20}});
  const auto described = DescribeForLlamaCpp(geometry, *state->state().tokens, all);
  ASSERT_TRUE(described.ok()) << described.status();
  EXPECT_EQ(described->state, state->state());
}

TEST(GeometryMapTest, WhatForeignFormatsCannotHoldIsSaid) {
  LayerGroupSpec recurrent;
  recurrent.kind = LayerGroupSpec::Kind::kRecurrent;
  recurrent.layers = {1};
  recurrent.opaque_bytes = 64;
  LayerGroupSpec rotated = Group({1});
  rotated.basis = LayerGroupSpec::Basis::kHadamard;
  LayerGroupSpec scaled = Group({1});
  scaled.scale = LayerGroupSpec::ScaleKind::kPerTokenAndHead;
  for (const auto& [group, text] : {std::pair{recurrent, "recurrent or opaque"},
                                    {rotated, "Hadamard-rotated basis"},
                                    {scaled, "scales beside its rows"}}) {
    const absl::Status status = CheckForeignGeometry(Geometry({Group({0}), group}));
    EXPECT_EQ(GetReason(status), "CANNOT_EXPRESS");
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
  EXPECT_TRUE(CheckForeignGeometry(Geometry({Group({0})})).ok());
}

}  // namespace
}  // namespace pagetide
