#include "core/geometry.h"

#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

// 2 layers of 8 heads × 128 in f16: rows of 2048 bytes, pages of 256 × 4096 × 2 bytes.
GeometrySpec PlainSpec() {
  GeometrySpec spec;
  LayerGroupSpec group;
  group.layers = {0, 1};
  group.kv_heads = 8;
  group.k_dim = 128;
  group.v_dim = 128;
  group.rope = {.style = RopeSpec::Style::kNeox, .n_rot = 64};
  spec.groups = {group};
  return spec;
}

TEST(GeometryTest, LaysRowsOutLayerByLayerKBeforeV) {
  const PageGeometry geometry = PageGeometry::Create(PlainSpec()).value();
  const GroupGeometry& group = geometry.group(0);
  EXPECT_EQ(group.k_row_bytes(), 2048u);
  EXPECT_EQ(group.v_row_bytes(), 2048u);
  EXPECT_EQ(group.layer_bytes(), 256u * 4096);
  EXPECT_EQ(group.page_bytes(), uint64_t{2} << 20);
  EXPECT_EQ(group.RowOffset(0, RowKind::kK, 0), 0u);
  EXPECT_EQ(group.RowOffset(0, RowKind::kK, 3), 3u * 2048);
  EXPECT_EQ(group.RowOffset(0, RowKind::kV, 0), 256u * 2048);
  EXPECT_EQ(group.RowOffset(1, RowKind::kV, 255), group.page_bytes() - 2048);
  EXPECT_TRUE(group.can_attend());
}

// Every byte of a page belongs to exactly one row, also where K and V rows differ.
TEST(GeometryTest, RowsTileThePage) {
  GeometrySpec spec = PlainSpec();
  spec.page_tokens = 5;
  spec.groups[0].layers = {2, 3, 7};
  spec.groups[0].kv_heads = 3;
  spec.groups[0].k_type = DataType::kQ8_0;
  spec.groups[0].k_dim = 64;
  spec.groups[0].v_dim = 7;
  const PageGeometry geometry = PageGeometry::Create(spec).value();
  const GroupGeometry& group = geometry.group(0);
  EXPECT_EQ(group.k_row_bytes(), 3u * 2 * 34);
  EXPECT_EQ(group.v_row_bytes(), 3u * 7 * 2);
  std::vector<int> owners(group.page_bytes());
  for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      for (uint32_t slot = 0; slot < 5; ++slot) {
        const uint64_t offset = group.RowOffset(layer, kind, slot);
        for (uint32_t i = 0; i < group.row_bytes(kind); ++i) ++owners.at(offset + i);
      }
    }
  }
  EXPECT_EQ(owners, std::vector<int>(group.page_bytes(), 1));
}

TEST(GeometryTest, RowBytesOfEveryType) {
  const std::vector<std::pair<DataType, uint32_t>> bytes_of_64 = {
      {DataType::kF32, 256},   {DataType::kF16, 128},   {DataType::kBF16, 128},
      {DataType::kF8E4M3, 64}, {DataType::kF8E5M2, 64}, {DataType::kQ8_0, 68},
      {DataType::kQ5_0, 44},   {DataType::kQ5_1, 48},   {DataType::kQ4_0, 36},
      {DataType::kQ4_1, 40},   {DataType::kIQ4NL, 36}};
  std::set<std::string> names;
  for (const auto& [type, bytes] : bytes_of_64) {
    GeometrySpec spec = PlainSpec();
    spec.groups[0].kv_heads = 1;
    spec.groups[0].k_dim = 64;
    spec.groups[0].k_type = type;
    EXPECT_EQ(PageGeometry::Create(spec)->group(0).k_row_bytes(), bytes) << DataTypeName(type);
    names.insert(std::string(DataTypeName(type)));
  }
  EXPECT_EQ(names.size(), bytes_of_64.size());
}

TEST(GeometryTest, LatentPackedAndOpaqueGroups) {
  GeometrySpec spec = PlainSpec();
  spec.groups[0].v_dim = 0;
  LayerGroupSpec packed;
  packed.layers = {2};
  packed.packed_row_bytes = 656;
  LayerGroupSpec recurrent;
  recurrent.kind = LayerGroupSpec::Kind::kRecurrent;
  recurrent.layers = {3};
  recurrent.opaque_bytes = 12345;
  spec.groups.push_back(packed);
  spec.groups.push_back(recurrent);
  const PageGeometry geometry = PageGeometry::Create(spec).value();
  EXPECT_EQ(geometry.group(0).page_bytes(), uint64_t{1} << 20);
  EXPECT_TRUE(geometry.group(0).can_attend());
  EXPECT_EQ(geometry.group(1).page_bytes(), 256u * 656);
  EXPECT_TRUE(geometry.group(1).has_rows());
  EXPECT_FALSE(geometry.group(1).can_attend());
  EXPECT_EQ(geometry.group(2).page_bytes(), 12345u);
  EXPECT_FALSE(geometry.group(2).has_rows());
  EXPECT_EQ(geometry.bytes_per_page_of_tokens(), (uint64_t{1} << 20) + 256 * 656 + 12345);
}

TEST(GeometryTest, ColdTypesChangeWhatIsStoredAndNothingElse) {
  GeometrySpec spec = PlainSpec();
  spec.groups[0].cold_k_type = DataType::kQ8_0;
  spec.groups[0].cold_v_type = DataType::kQ4_0;
  const PageGeometry geometry = PageGeometry::Create(spec).value();
  const PageGeometry plain_geometry = PageGeometry::Create(PlainSpec()).value();
  const GroupGeometry& group = geometry.group(0);
  const GroupGeometry& plain = plain_geometry.group(0);
  EXPECT_TRUE(group.has_cold_types());
  EXPECT_EQ(group.page_bytes(), plain.page_bytes());
  EXPECT_EQ(group.k_row_bytes(), plain.k_row_bytes());
  // 8 heads of 128: 4 groups of 34 or 18 bytes each.
  EXPECT_EQ(group.stored_row_bytes(RowKind::kK), 8u * 4 * 34);
  EXPECT_EQ(group.stored_row_bytes(RowKind::kV), 8u * 4 * 18);
  EXPECT_EQ(group.stored_page_bytes(), 2u * 256 * 8 * 4 * (34 + 18));
  EXPECT_EQ(group.StoredRowOffset(1, RowKind::kV, 3),
            256u * 8 * 4 * (34 + 18) + 256u * 8 * 4 * 34 + 3u * 8 * 4 * 18);
  // The types themselves are no cold types.
  spec.groups[0].cold_k_type = spec.groups[0].k_type;
  spec.groups[0].cold_v_type = spec.groups[0].v_type;
  const PageGeometry same = PageGeometry::Create(spec).value();
  EXPECT_FALSE(same.group(0).has_cold_types());
  EXPECT_EQ(same.group(0).fingerprint(), plain.fingerprint());
  EXPECT_EQ(same.group(0).stored_page_bytes(), plain.page_bytes());
  EXPECT_EQ(same.spec(), PlainSpec());
}

TEST(GeometryTest, PagesForRoundsUp) {
  const PageGeometry geometry = PageGeometry::Create(PlainSpec()).value();
  EXPECT_EQ(geometry.PagesFor(0), 0u);
  EXPECT_EQ(geometry.PagesFor(1), 1u);
  EXPECT_EQ(geometry.PagesFor(256), 1u);
  EXPECT_EQ(geometry.PagesFor(257), 2u);
}

struct BadSpec {
  std::string what;  // must be in the message
  std::function<void(GeometrySpec&)> spoil;
};

TEST(GeometryTest, RefusalsNameTheFieldAndTheNumbers) {
  const std::vector<BadSpec> bad = {
      {"page_tokens = 0", [](GeometrySpec& s) { s.page_tokens = 0; }},
      {"page_tokens = 65537", [](GeometrySpec& s) { s.page_tokens = 65537; }},
      {"groups has 0", [](GeometrySpec& s) { s.groups.clear(); }},
      {"groups has 65", [](GeometrySpec& s) { s.groups.resize(65, s.groups[0]); }},
      {"groups[0].layers", [](GeometrySpec& s) { s.groups[0].layers = {}; }},
      {"groups[0].layers",
       [](GeometrySpec& s) {
         s.groups[0].layers = {1, 1};
       }},
      {"groups[0].layers",
       [](GeometrySpec& s) {
         s.groups[0].layers = {2, 1};
       }},
      {"kv_heads = 0", [](GeometrySpec& s) { s.groups[0].kv_heads = 0; }},
      {"k_dim = 65537", [](GeometrySpec& s) { s.groups[0].k_dim = 65537; }},
      {"k_dim = 100 is not a multiple of 32",
       [](GeometrySpec& s) {
         s.groups[0].k_dim = 100;
         s.groups[0].k_type = DataType::kQ4_0;
       }},
      {"unknown k_type", [](GeometrySpec& s) { s.groups[0].k_type = DataType{99}; }},
      {"unknown k_type", [](GeometrySpec& s) { s.groups[0].v_type = DataType{0}; }},
      {"rope.n_rot = 63", [](GeometrySpec& s) { s.groups[0].rope.n_rot = 63; }},
      {"rope.n_rot = 130", [](GeometrySpec& s) { s.groups[0].rope.n_rot = 130; }},
      {"rope.base", [](GeometrySpec& s) { s.groups[0].rope.base = 0; }},
      {"rope.factors has 3",
       [](GeometrySpec& s) {
         s.groups[0].rope.factors = {1, 1, 1};
       }},
      {"position_components = 5",
       [](GeometrySpec& s) { s.groups[0].rope.position_components = 5; }},
      {"window fields", [](GeometrySpec& s) { s.groups[0].window_tokens = 5; }},
      {"window_tokens > 0",
       [](GeometrySpec& s) { s.groups[0].kind = LayerGroupSpec::Kind::kWindow; }},
      {"keep_tokens = 8 is not below window_tokens = 8",
       [](GeometrySpec& s) {
         s.groups[0].kind = LayerGroupSpec::Kind::kWindow;
         s.groups[0].window_type = LayerGroupSpec::WindowType::kRing;
         s.groups[0].window_tokens = s.groups[0].keep_tokens = 8;
       }},
      {"keep_tokens = 2 on a window that is no ring",
       [](GeometrySpec& s) {
         s.groups[0].kind = LayerGroupSpec::Kind::kWindow;
         s.groups[0].window_type = LayerGroupSpec::WindowType::kStandard;
         s.groups[0].window_tokens = 8;
         s.groups[0].keep_tokens = 2;
       }},
      {"window fields", [](GeometrySpec& s) { s.groups[0].keep_tokens = 1; }},
      {"opaque_bytes = 0",
       [](GeometrySpec& s) { s.groups[0].kind = LayerGroupSpec::Kind::kOpaque; }},
      {"scale_digest has 0",
       [](GeometrySpec& s) { s.groups[0].scale = LayerGroupSpec::ScaleKind::kPerLayer; }},
      {"exceeds", [](GeometrySpec& s) { s.page_tokens = 65536, s.groups[0].kv_heads = 4096; }},
      {"exceed", [](GeometrySpec& s) { s.groups[0].kv_heads = 4096, s.groups[0].k_dim = 65536; }},
      {"shard.rank = 2", [](GeometrySpec& s) { s.shard.rank = 2, s.shard.num_ranks = 2; }},
      {"groups[0].cold_k_type: k_dim = 100 is not a multiple of 32, as q8_0 needs",
       [](GeometrySpec& s) {
         s.groups[0].k_dim = 100;
         s.groups[0].cold_k_type = DataType::kQ8_0;
       }},
      {"groups[0].cold_v_type: v_dim = 40 is not a multiple of 32, as q4_0 needs",
       [](GeometrySpec& s) {
         s.groups[0].v_dim = 40;
         s.groups[0].cold_v_type = DataType::kQ4_0;
       }},
      {"cold type 99 is not known",
       [](GeometrySpec& s) { s.groups[0].cold_k_type = DataType{99}; }},
      {"cold_v_type = q8_0 with v_dim = 0",
       [](GeometrySpec& s) {
         s.groups[0].v_dim = 0;
         s.groups[0].cold_v_type = DataType::kQ8_0;
       }},
      {"cold types need scale none, it is 2",
       [](GeometrySpec& s) {
         s.groups[0].scale = LayerGroupSpec::ScaleKind::kPerTokenAndHead;
         s.groups[0].cold_k_type = DataType::kQ8_0;
       }},
      {"on a group without typed rows",
       [](GeometrySpec& s) {
         s.groups[0].packed_row_bytes = 656;
         s.groups[0].cold_k_type = DataType::kQ8_0;
       }},
      {"range begins after its end", [](GeometrySpec& s) { s.shard.kv_head_begin = 1; }},
  };
  for (size_t i = 0; i < bad.size(); ++i) {
    SCOPED_TRACE(absl::StrCat(i, ": ", bad[i].what));
    GeometrySpec spec = PlainSpec();
    bad[i].spoil(spec);
    const absl::Status status = PageGeometry::Create(spec).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad[i].what));
  }
}

Digest FingerprintOf(const GeometrySpec& spec) {
  return PageGeometry::Create(spec).value().group(0).fingerprint();
}

// Computed apart from this code base with Python (u32, u64, field and sha as in keys_test.cc, and
// f64 = lambda v: struct.pack('<d', v)):
//   sha(field(b'pagetide.component.v1') + u32(256) + u32(1) + u32(0) + u32(0)  # kind, window
//       + u64(2) + u32(0) + u32(1)                                             # layers
//       + u32(2) + u32(2) + u32(0) + field(b'')                                # types, scale
//       + u32(8) + u32(128) + u32(128) + u32(0) + u64(0)
//       + u32(2) + u32(64) + f64(10000) + u32(0) + f64(1) + u64(0)             # RoPE
//       + f64(0) + f64(1) + f64(32) + f64(1) + u32(0) + u32(1)
//       + u32(0) + 4 * u32(0))                                                 # basis, shard
//       ranges
TEST(GeometryTest, GoldenFingerprint) {
  EXPECT_EQ(FingerprintOf(PlainSpec()).ToHex(),
            "65b3a6a71dd13fb1edd06da45015ec0e1801aef0d80dca42f537e17963a31cfa");
}

TEST(GeometryTest, WhatChangesBytesChangesTheFingerprintAndTheRankDoesNot) {
  std::set<Digest> seen = {FingerprintOf(PlainSpec())};
  const std::vector<std::function<void(GeometrySpec&)>> changes = {
      [](GeometrySpec& s) { s.page_tokens = 128; },
      [](GeometrySpec& s) {
        s.groups[0].layers = {0, 2};
      },
      [](GeometrySpec& s) { s.groups[0].k_type = DataType::kBF16; },
      [](GeometrySpec& s) { s.groups[0].v_type = DataType::kBF16; },
      [](GeometrySpec& s) { s.groups[0].kv_heads = 4; },
      [](GeometrySpec& s) { s.groups[0].k_dim = 64; },
      [](GeometrySpec& s) { s.groups[0].v_dim = 64; },
      [](GeometrySpec& s) { s.groups[0].rope.base = 500000; },
      [](GeometrySpec& s) { s.groups[0].rope.style = RopeSpec::Style::kNorm; },
      [](GeometrySpec& s) { s.groups[0].rope.factors.assign(32, 2.0f); },
      [](GeometrySpec& s) { s.groups[0].rope.yarn_beta_fast = 16; },
      [](GeometrySpec& s) { s.groups[0].basis = LayerGroupSpec::Basis::kHadamard; },
      [](GeometrySpec& s) { s.groups[0].cold_k_type = DataType::kQ8_0; },
      [](GeometrySpec& s) { s.groups[0].cold_v_type = DataType::kQ8_0; },
      [](GeometrySpec& s) { s.groups[0].cold_k_type = s.groups[0].cold_v_type = DataType::kQ8_0; },
      [](GeometrySpec& s) { s.shard.kv_head_end = 4; },
      [](GeometrySpec& s) { s.shard.layer_end = 1; },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    GeometrySpec spec = PlainSpec();
    changes[i](spec);
    EXPECT_TRUE(seen.insert(FingerprintOf(spec)).second) << i;
  }
  GeometrySpec replica = PlainSpec();
  replica.shard.num_ranks = 4;
  replica.shard.rank = 3;
  EXPECT_EQ(FingerprintOf(replica), FingerprintOf(PlainSpec()));
}

}  // namespace
}  // namespace pagetide
