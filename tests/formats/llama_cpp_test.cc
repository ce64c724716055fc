#include "formats/llama_cpp.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"
#include "base/little_endian.h"
#include "tests/formats/format_test_util.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

RowShape Typed(DataType type, uint64_t width) {
  return {type, width / DataTypeGroupElements(type) * DataTypeGroupBytes(type)};
}

// One block of `layers` equal layers with rows at 0…n-1.
RowBlock Block(size_t layers, uint32_t rows, RowShape k, RowShape v) {
  RowBlock block;
  block.positions.resize(rows);
  std::iota(block.positions.begin(), block.positions.end(), 0);
  for (uint32_t i = 0; i < layers; ++i) block.layers.push_back({k, v, i});
  return block;
}

std::string Write(const LlamaCppLayout& layout, const SequenceState& state, const RowReader& rows) {
  std::string out;
  const absl::Status status = WriteLlamaCpp(layout, state, rows, [&](absl::string_view part) {
    EXPECT_LE(part.size(), kMaxSinkBytes);
    out.append(part.data(), part.size());
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(LlamaCppStateBytes(layout, state).value_or(0), out.size());
  return out;
}

absl::Status Parse(absl::string_view bytes, LlamaCppHints hints = {}) {
  return LlamaCppState::Parse(bytes, hints).status();
}

// The case of FEATURES E4: 2 layers, width 8, f16, 3 cells.
struct SmallCase {
  SmallCase() {
    state.tokens = {{1, 2, 3}};
    state.blocks = {Block(2, 3, Typed(DataType::kF16, 8), Typed(DataType::kF16, 8))};
    layout.bodies.resize(1);
  }
  LlamaCppLayout layout;
  SequenceState state;
};

TEST(LlamaCppTest, SmallCaseHasTheSizesOfTheFormat) {
  SmallCase c;
  const MemoryRows rows(&c.state, 1);
  EXPECT_EQ(Write(c.layout, c.state, rows).size(), 316);
  c.layout.form = LlamaCppForm::kMemory;
  EXPECT_EQ(Write(c.layout, c.state, rows).size(), 300);
  c.layout.form = LlamaCppForm::kBody;
  EXPECT_EQ(Write(c.layout, c.state, rows).size(), 292);
}

// Rows whose bytes count up, so that the expected file can be written down by hand.
class CountingRows : public RowReader {
 public:
  absl::Status ReadRows(const RowRange& r, std::span<std::byte> out) const override {
    const size_t row = out.size() / r.count;
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] =
          static_cast<std::byte>((r.layer * 2 + (r.kind == RowKind::kV)) * 48 + r.first * row + i);
    }
    return absl::OkStatus();
  }
};

std::string Counting(int from, int n) {
  std::string out;
  for (int i = 0; i < n; ++i) out.push_back(static_cast<char>(from + i));
  return out;
}

TEST(LlamaCppTest, SmallCaseIsTheGoldenFile) {
  const SmallCase c;
  const std::string golden = absl::HexStringToBytes(
                                 "71736767"
                                 "02000000"
                                 "03000000"
                                 "010000000200000003000000"
                                 "01000000"                  // streams
                                 "03000000"                  // cells
                                 "000000000100000000000000"  // position, sequences, sequence
                                 "010000000100000000000000"
                                 "020000000100000000000000"
                                 "00000000"                     // v_trans
                                 "02000000"                     // layers
                                 "010000001000000000000000") +  // K: f16, row bytes
                             Counting(0, 48) +
                             absl::HexStringToBytes("010000001000000000000000") + Counting(96, 48) +
                             absl::HexStringToBytes("010000001000000000000000") + Counting(48, 48) +
                             absl::HexStringToBytes("010000001000000000000000") + Counting(144, 48);
  ASSERT_EQ(golden.size(), 316);
  EXPECT_EQ(absl::BytesToHexString(Write(c.layout, c.state, CountingRows())),
            absl::BytesToHexString(golden));
  const auto parsed = LlamaCppState::Parse(golden, {});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->state(), c.state);
  EXPECT_EQ(parsed->layout(), c.layout);
  EXPECT_EQ(ReadAll(*parsed, parsed->state(), 0, 1, RowKind::kV), Counting(144, 48));
}

TEST(LlamaCppTest, TransposedVIsWrittenByColumns) {
  SmallCase c;
  c.layout.bodies[0].v_transposed = true;
  const std::string file = Write(c.layout, c.state, CountingRows());
  ASSERT_EQ(file.size(), 316);
  // Of the last layer: type, element bytes, width, then column 0 of rows 0, 1, 2.
  EXPECT_EQ(absl::BytesToHexString(file.substr(316 - 60, 12 + 6)),
            "010000000200000008000000"
            "9091a0a1b0b1");
  const auto parsed = LlamaCppState::Parse(file, {});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(ReadAll(*parsed, parsed->state(), 0, 1, RowKind::kV, 2), Counting(144, 48));
}

struct RoundTripCase {
  const char* name;
  DataType k;
  DataType v;
  bool v_transposed;
};

class LlamaCppRoundTripTest : public ::testing::TestWithParam<RoundTripCase> {};

TEST_P(LlamaCppRoundTripTest, FileAndRowsComeBack) {
  const RoundTripCase& p = GetParam();
  for (const LlamaCppForm form :
       {LlamaCppForm::kFile, LlamaCppForm::kMemory, LlamaCppForm::kBody}) {
    for (const size_t bodies : {1, 2}) {
      SequenceState state;
      if (form == LlamaCppForm::kFile) state.tokens = {{5, 6, 7, 0x7fffffff}};
      LlamaCppLayout layout;
      layout.form = form;
      layout.sequence_id = 3;
      layout.bodies.resize(bodies);
      for (size_t b = 0; b < bodies; ++b) {
        // The second body has fewer rows, as the window of an interleaved cache.
        RowBlock block = Block(2 + b, b == 0 ? 33 : 5, Typed(p.k, 64), Typed(p.v, 96));
        // Cells lie in any order; a context that is not unified has other, empty, streams.
        std::swap(block.positions.front(), block.positions.back());
        layout.bodies[b].v_transposed = p.v_transposed;
        layout.bodies[b].num_streams = 1 + 2 * b;
        layout.bodies[b].stream = b;
        state.blocks.push_back(block);
      }
      const MemoryRows rows(&state, 42);
      const std::string file = Write(layout, state, rows);
      const auto parsed = LlamaCppState::Parse(file, {});
      ASSERT_TRUE(parsed.ok()) << parsed.status();
      EXPECT_EQ(parsed->state(), state);
      EXPECT_EQ(parsed->layout(), layout);
      for (size_t b = 0; b < bodies; ++b) {
        for (size_t l = 0; l < state.blocks[b].layers.size(); ++l) {
          for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
            EXPECT_EQ(ReadAll(*parsed, state, b, l, kind), rows.Of(b, l, kind));
          }
        }
      }
      EXPECT_EQ(Write(parsed->layout(), parsed->state(), *parsed), file);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Types, LlamaCppRoundTripTest,
    ::testing::Values(RoundTripCase{"F32", DataType::kF32, DataType::kF32, false},
                      RoundTripCase{"F32Transposed", DataType::kF32, DataType::kF32, true},
                      RoundTripCase{"F16", DataType::kF16, DataType::kF16, false},
                      RoundTripCase{"F16Transposed", DataType::kF16, DataType::kF16, true},
                      RoundTripCase{"Bf16", DataType::kBF16, DataType::kBF16, false},
                      RoundTripCase{"Bf16Transposed", DataType::kBF16, DataType::kBF16, true},
                      RoundTripCase{"Q8_0", DataType::kQ8_0, DataType::kQ8_0, false},
                      RoundTripCase{"Q8_0WithF16Transposed", DataType::kQ8_0, DataType::kF16, true},
                      RoundTripCase{"Q4_0", DataType::kQ4_0, DataType::kQ4_0, false},
                      RoundTripCase{"Q4_1", DataType::kQ4_1, DataType::kQ4_1, false},
                      RoundTripCase{"Q5_0", DataType::kQ5_0, DataType::kQ5_0, false},
                      RoundTripCase{"Q5_1", DataType::kQ5_1, DataType::kQ5_1, false},
                      RoundTripCase{"Iq4Nl", DataType::kIQ4NL, DataType::kIQ4NL, false}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(LlamaCppTest, LatentCacheHasNoVSection) {
  SequenceState state;
  state.tokens = {{1, 2}};
  state.blocks = {Block(3, 2, Typed(DataType::kF16, 576), RowShape{})};
  LlamaCppLayout layout;
  layout.bodies.resize(1);
  const MemoryRows rows(&state, 7);
  const std::string file = Write(layout, state, rows);
  LlamaCppHints hints;
  hints.has_v = false;
  const auto parsed = LlamaCppState::Parse(file, hints);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(Write(parsed->layout(), parsed->state(), *parsed), file);
  EXPECT_TRUE(absl::IsDataLoss(Parse(file)));  // taken for a cache with V
}

TEST(LlamaCppTest, CellExtensionsOfBothVersionsComeBack) {
  for (const auto& [version, ext] : {std::pair{2u, 8u}, std::pair{3u, 12u}}) {
    SmallCase c;
    c.layout.version = version;
    c.layout.cell_ext_bytes = ext;
    c.layout.bodies[0].cell_ext = Counting(1, 3 * ext);
    const std::string file = Write(c.layout, c.state, MemoryRows(&c.state, 9));
    LlamaCppHints hints;
    hints.cell_ext_bytes = ext;
    const auto parsed = LlamaCppState::Parse(file, hints);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->layout(), c.layout);
    EXPECT_EQ(Write(parsed->layout(), parsed->state(), *parsed), file);
    EXPECT_FALSE(Parse(file).ok());  // taken for a model without extensions
  }
}

TEST(LlamaCppTest, EmptySequenceIsAFileToo) {
  SequenceState state;
  state.tokens.emplace();
  state.blocks.resize(1);
  LlamaCppLayout layout;
  layout.bodies.resize(1);
  const std::string file = Write(layout, state, MemoryRows(&state, 1));
  EXPECT_EQ(file.size(), 12 + 8);
  const auto parsed = LlamaCppState::Parse(file, {});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->state(), state);
}

TEST(LlamaCppTest, HostileVariantsAreRefused) {
  for (const bool transposed : {false, true}) {
    SmallCase c;
    c.layout.bodies[0].v_transposed = transposed;
    CheckHostileVariants(Write(c.layout, c.state, MemoryRows(&c.state, 3)),
                         [](absl::string_view bytes) { return Parse(bytes); });
  }
}

std::string SmallFile() {
  const SmallCase c;
  return Write(c.layout, c.state, CountingRows());
}

// The bytes at `offset` of the small file replaced by a little-endian integer.
template <typename T>
absl::Status ParseWith(size_t offset, T value) {
  std::string file = SmallFile();
  std::string raw;
  AppendLittleEndian(&raw, value);
  file.replace(offset, raw.size(), raw);
  return Parse(file);
}

TEST(LlamaCppTest, HugeCountsAreDataLossBeforeAnythingIsAllocated) {
  struct Case {
    size_t offset;
    uint32_t count;
    const char* text;
  };
  const Case cases[] = {
      {8, 1u << 31, "2147483648 tokens, at most 16777216"},
      {8, 1u << 24, "tokens needs 16777216"},
      {24, 1u << 31, "a body has 2147483648 streams"},
      {28, 1u << 31, "2147483648 cells, at most 16777216"},
      {28, 1u << 24, "cells needs 16777216"},
      {72, 1u << 31, "a body has 2147483648 layers"},
  };
  for (const auto& [offset, count, text] : cases) {
    const absl::Status status = ParseWith(offset, count);
    EXPECT_TRUE(absl::IsDataLoss(status)) << offset << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
  // 3 cells × this overflows 64 bits.
  const absl::Status overflow = ParseWith(80, uint64_t{0x5555555555555560});
  EXPECT_TRUE(absl::IsDataLoss(overflow)) << overflow;
}

TEST(LlamaCppTest, ContradictionsAreDataLoss) {
  EXPECT_TRUE(absl::IsDataLoss(ParseWith(12, uint32_t{0xffffffff})));  // token -1
  EXPECT_TRUE(absl::IsDataLoss(ParseWith(32, uint32_t{0x80000000})));  // position
  EXPECT_TRUE(absl::IsDataLoss(ParseWith(36, uint32_t{2})));           // sequences of a cell
  EXPECT_TRUE(absl::IsDataLoss(ParseWith(52, uint32_t{1})));           // another sequence
  EXPECT_TRUE(absl::IsDataLoss(ParseWith(68, uint32_t{2})));           // v_trans
  EXPECT_TRUE(absl::IsDataLoss(ParseWith(80, uint64_t{17})));          // row bytes of f16
  EXPECT_TRUE(absl::IsDataLoss(Parse(SmallFile() + "x")));
}

TEST(LlamaCppTest, UnknownVersionTypeOrMagicIsInvalid) {
  for (const auto& [offset, text] : {std::pair<size_t, const char*>{0, "begins with 0x00012345"},
                                     {4, "version 74565"},
                                     {76, "ggml type 74565"}}) {
    const absl::Status status = ParseWith(offset, uint32_t{0x12345});
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
}

TEST(LlamaCppTest, WhatTheFormatCannotHoldIsRefused) {
  const auto refused = [](const LlamaCppLayout& layout, const SequenceState& state) {
    return LlamaCppStateBytes(layout, state).status();
  };
  SmallCase fp8;
  fp8.state.blocks[0].layers[1].k.type = DataType::kF8E4M3;
  EXPECT_TRUE(absl::IsFailedPrecondition(refused(fp8.layout, fp8.state)));
  SmallCase packed;
  packed.state.blocks[0].layers[1].k.type.reset();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused(packed.layout, packed.state)));
  SmallCase quantised;
  quantised.state.blocks = {Block(2, 3, Typed(DataType::kQ8_0, 32), Typed(DataType::kQ8_0, 32))};
  quantised.layout.bodies[0].v_transposed = true;
  EXPECT_TRUE(absl::IsFailedPrecondition(refused(quantised.layout, quantised.state)));
  SmallCase mixed;
  mixed.state.blocks[0].layers[1].v = RowShape{};
  EXPECT_TRUE(absl::IsFailedPrecondition(refused(mixed.layout, mixed.state)));
  SmallCase tokens;
  tokens.state.tokens = {{0x80000000}};
  EXPECT_TRUE(absl::IsFailedPrecondition(refused(tokens.layout, tokens.state)));
  tokens.state.tokens.reset();
  EXPECT_TRUE(absl::IsInvalidArgument(refused(tokens.layout, tokens.state)));
}

TEST(LlamaCppTest, ASinkThatFailsEndsTheWriting) {
  const SmallCase c;
  const absl::Status status =
      WriteLlamaCpp(c.layout, c.state, CountingRows(),
                    [](absl::string_view) { return absl::CancelledError("caller left"); });
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
}

// Written by llama.cpp itself: see testdata/make_llama_cpp_states.py.
class LlamaCppRealFileTest : public ::testing::TestWithParam<const char*> {};

TEST_P(LlamaCppRealFileTest, ReadsAndWritesTheSameBytes) {
  const absl::string_view name = GetParam();
  const bool is_file = absl::EndsWith(name, ".ggsq");
  const std::string bytes = TestFile(std::string(name));
  const auto parsed = LlamaCppState::Parse(bytes, {});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->layout().form, is_file ? LlamaCppForm::kFile : LlamaCppForm::kMemory);
  if (is_file) {
    EXPECT_EQ(parsed->layout().version, absl::StrContains(name, "_v2_") ? 2 : 3);
    ASSERT_TRUE(parsed->state().tokens.has_value());
    ASSERT_EQ(parsed->state().tokens->size(), 20);
    EXPECT_EQ((*parsed->state().tokens)[19], (7 * 19 + 3) % 64);
  }
  EXPECT_EQ(parsed->layout().sequence_id, 1);
  const bool iswa = absl::StrContains(name, "iswa");
  ASSERT_EQ(parsed->state().blocks.size(), iswa ? 2 : 1);
  const RowBlock& block = parsed->state().blocks[0];
  ASSERT_EQ(block.positions.size(), 20);
  for (uint32_t i = 0; i < 20; ++i) EXPECT_EQ(block.positions[i], i);
  EXPECT_EQ(block.layers.size(), iswa ? 1 : 2);
  const DataType k = absl::StrContains(name, "q8_0")      ? DataType::kQ8_0
                     : absl::StrContains(name, "streams") ? DataType::kBF16
                                                          : DataType::kF16;
  EXPECT_EQ(block.layers[0].k, Typed(k, 32));
  EXPECT_EQ(parsed->layout().bodies[0].v_transposed, absl::StrContains(name, "transposed"));
  if (iswa) {
    // A window of 8: only rows that a next token may attend to.
    const RowBlock& window = parsed->state().blocks[1];
    EXPECT_THAT(window.positions, ::testing::ElementsAre(12, 13, 14, 15, 16, 17, 18, 19));
    EXPECT_EQ(window.layers.size(), 5);
  }
  if (absl::StrContains(name, "streams")) {
    EXPECT_EQ(parsed->layout().bodies[0].num_streams, 2);
    EXPECT_EQ(parsed->layout().bodies[0].stream, 1);
  }
  EXPECT_EQ(Write(parsed->layout(), parsed->state(), *parsed), bytes);
  LlamaCppHints hints;
  hints.num_bodies = iswa ? 2 : 1;
  CheckHostileVariants(bytes, [&](absl::string_view b) { return Parse(b, hints); });
}

INSTANTIATE_TEST_SUITE_P(
    Files, LlamaCppRealFileTest,
    ::testing::Values("llama_cpp_v2_full_plain.ggsq", "llama_cpp_v2_full_plain.mem",
                      "llama_cpp_v2_full_q8_0.ggsq", "llama_cpp_v2_full_q8_0.mem",
                      "llama_cpp_v2_full_streams.ggsq", "llama_cpp_v2_full_streams.mem",
                      "llama_cpp_v2_full_transposed.ggsq", "llama_cpp_v2_full_transposed.mem",
                      "llama_cpp_v2_iswa.ggsq", "llama_cpp_v2_iswa.mem",
                      "llama_cpp_v2_iswa_transposed.ggsq", "llama_cpp_v2_iswa_transposed.mem",
                      "llama_cpp_v3_full_plain.ggsq", "llama_cpp_v3_full_q8_0.ggsq",
                      "llama_cpp_v3_full_streams.ggsq", "llama_cpp_v3_full_transposed.ggsq",
                      "llama_cpp_v3_iswa.ggsq", "llama_cpp_v3_iswa_transposed.ggsq"),
    [](const auto& info) {
      return absl::StrReplaceAll(info.param, {{".", "_"}});
    });

}  // namespace
}  // namespace pagetide
