// Files of every format, most of them written by the programs themselves, in and out again through
// a real gRPC server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "formats/geometry_map.h"
#include "formats/llama_cpp.h"
#include "tests/services/session_files_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

TEST_F(SessionFilesTest, StatesOfTheRealLlamaCppComeOutAsTheyWentIn) {
  Start(LlamaSpec());
  for (const std::string name :
       {"llama_cpp_v2_full_plain.ggsq", "llama_cpp_v2_full_transposed.ggsq",
        "llama_cpp_v3_full_plain.ggsq", "llama_cpp_v3_full_transposed.ggsq",
        "llama_cpp_v2_full_plain.mem", "llama_cpp_v2_full_transposed.mem"}) {
    SCOPED_TRACE(name);
    const std::string file = TestFile(name);
    const bool has_tokens = name.ends_with(".ggsq");
    const auto imported = Import(file, has_tokens ? std::vector<uint32_t>() : LlamaTokens());
    ASSERT_TRUE(imported.ok()) << imported.status();
    EXPECT_EQ(imported->format(), v1::STATE_FORMAT_LLAMA_CPP);
    EXPECT_EQ(imported->state().length(), 20);
    EXPECT_EQ(imported->state().canonical_length(), 0);
    EXPECT_FALSE(imported->canonical());
    const auto again =
        Export(imported->state().sequence_id(), v1::STATE_FORMAT_LLAMA_CPP, imported->layout());
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(*again == file);
  }
}

TEST_F(SessionFilesTest, StreamsAndTypesOfTheRealLlamaCppComeBack) {
  Start(SpecOf("streams", 2, 1, 32, DataType::kBF16, DataType::kF16));
  const std::string streams = TestFile("llama_cpp_v2_full_streams.ggsq");
  auto imported = Import(streams);
  ASSERT_TRUE(imported.ok()) << imported.status();
  auto again =
      Export(imported->state().sequence_id(), v1::STATE_FORMAT_LLAMA_CPP, imported->layout());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(*again == streams);

  // Quantised rows: the file does not say whether they are rotated.
  StartAfresh(SpecOf("q8", 2, 1, 32, DataType::kQ8_0, DataType::kQ8_0));
  const std::string q8 = TestFile("llama_cpp_v2_full_q8_0.ggsq");
  imported = Import(q8);
  EXPECT_TRUE(absl::IsFailedPrecondition(imported.status())) << imported.status();
  EXPECT_EQ(GetReason(imported.status()), "BASIS_UNKNOWN");
  v1::ImportSequenceRequest::Header header;
  header.set_basis(v1::ImportSequenceRequest::Header::BASIS_HADAMARD);
  imported = Import(q8, {}, header);
  EXPECT_EQ(GetReason(imported.status()), "MODEL_MISMATCH");
  header.set_basis(v1::ImportSequenceRequest::Header::BASIS_PLAIN);
  imported = Import(q8, {}, header);
  ASSERT_TRUE(imported.ok()) << imported.status();
  again = Export(imported->state().sequence_id(), v1::STATE_FORMAT_LLAMA_CPP, imported->layout());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(*again == q8);
}

TEST_F(SessionFilesTest, TwoBodiesOfTheRealLlamaCppComeOutAsTheyWentIn) {
  Start(InterleavedSpec(8));
  for (const std::string name : {"llama_cpp_v2_iswa", "llama_cpp_v2_iswa_transposed",
                                 "llama_cpp_v3_iswa", "llama_cpp_v3_iswa_transposed"}) {
    SCOPED_TRACE(name);
    ExpectRoundTrip(TestFile(name + ".ggsq"));
    if (name.find("_v2_") != std::string::npos) {
      ExpectRoundTrip(TestFile(name + ".mem"), LlamaTokens());
    }
  }
  // Rows that the file has not are not there: no rewind to a length whose next token would see
  // them, and no going back on that after more was appended.
  const auto imported = Import(TestFile("llama_cpp_v2_iswa.ggsq"));
  ASSERT_TRUE(imported.ok()) << imported.status();
  const std::string rows = RowsOf(imported->state().sequence_id());
  const auto rewound = client_->Rewind(imported->state(), 18);
  EXPECT_EQ(GetReason(rewound.status()), "ROWS_RECLAIMED") << rewound.status();
  EXPECT_EQ(RowsOf(imported->state().sequence_id()), rows);
  // One token back is in order: its next token sees rows 12 to 18.
  EXPECT_TRUE(client_->Rewind(imported->state(), 19).ok());
  // A wider window needs rows that the file has not.
  StartAfresh(InterleavedSpec(9));
  EXPECT_TRUE(Import(TestFile("llama_cpp_v2_iswa.ggsq")).ok());  // 8 rows are all that it sees
  StartAfresh(InterleavedSpec(10));
  EXPECT_EQ(GetReason(Import(TestFile("llama_cpp_v2_iswa.ggsq")).status()), "MODEL_MISMATCH");
}

// A state of `model` with random rows, as llama.cpp would write it.
std::string MadeState(const Model& model, const LlamaCppLayout& shape, uint32_t num_tokens,
                      uint64_t seed, bool with_turned_window = false) {
  const PageGeometry& geometry = model.geometry();
  const std::vector<std::vector<RowSpan>> all(geometry.num_groups(), {{0, num_tokens}});
  auto described = DescribeForLlamaCpp(geometry, TestTokens(seed, num_tokens), all);
  EXPECT_TRUE(described.ok()) << described.status();
  if (!described.ok()) return "";
  if (with_turned_window) {
    std::vector<uint32_t>& cells = described->state.blocks.back().positions;
    std::rotate(cells.begin(), cells.begin() + 3, cells.end());
  }
  LlamaCppLayout layout = shape;
  layout.bodies.resize(described->state.blocks.size(), shape.bodies.front());
  const MemoryRows rows(&described->state, seed);
  std::string file;
  const absl::Status written =
      WriteLlamaCpp(layout, described->state, rows, [&](absl::string_view part) {
        file.append(part.data(), part.size());
        return absl::OkStatus();
      });
  EXPECT_TRUE(written.ok()) << written;
  return file;
}

TEST_F(SessionFilesTest, SizesOfTheSmallCase) {
  // 2 layers of width 8 in f16, 3 cells.
  Start(SpecOf("small", 2, 1, 8));
  const v1::SequenceState state = Filled(TestTokens(6, 3));
  const std::pair<v1::FileLayout::LlamaForm, size_t> sizes[] = {
      {v1::FileLayout::LLAMA_FORM_BODY, 292},
      {v1::FileLayout::LLAMA_FORM_MEMORY, 300},
      {v1::FileLayout::LLAMA_FORM_FILE, 316}};
  for (const auto& [form, size] : sizes) {
    v1::FileLayout layout;
    layout.set_llama_form(form);
    const auto file = Export(state.sequence_id(), v1::STATE_FORMAT_LLAMA_CPP, layout);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ(file->size(), size);
    // A bare body begins like no format of its own: it is named.
    v1::ImportSequenceRequest::Header header;
    header.set_format(v1::STATE_FORMAT_LLAMA_CPP);
    ExpectRoundTrip(
        *file, form == v1::FileLayout::LLAMA_FORM_FILE ? std::vector<uint32_t>() : TestTokens(6, 3),
        header);
  }
}

TEST_F(SessionFilesTest, EveryTypeOfLlamaCppComesBackInBothFormsAndOrdersOfV) {
  const DataType types[] = {DataType::kF32,  DataType::kF16,  DataType::kBF16,
                            DataType::kQ8_0, DataType::kQ5_0, DataType::kQ5_1,
                            DataType::kQ4_0, DataType::kQ4_1, DataType::kIQ4NL};
  uint64_t seed = 100;
  for (const DataType type : types) {
    SCOPED_TRACE(std::string(DataTypeName(type)));
    StartAfresh(SpecOf("type", 3, 2, 32, type, type));
    const bool is_plain = DataTypeGroupElements(type) == 1;
    for (const LlamaCppForm form : {LlamaCppForm::kFile, LlamaCppForm::kMemory}) {
      for (const bool v_transposed : {false, true}) {
        if (v_transposed && !is_plain) continue;  // the format has no such thing
        LlamaCppLayout layout;
        layout.form = form;
        layout.sequence_id = 7;
        layout.bodies.resize(1);
        layout.bodies[0].v_transposed = v_transposed;
        ++seed;
        v1::ImportSequenceRequest::Header header;
        header.set_basis(v1::ImportSequenceRequest::Header::BASIS_PLAIN);
        ExpectRoundTrip(
            MadeState(*model_, layout, 13, seed),
            form == LlamaCppForm::kFile ? std::vector<uint32_t>() : TestTokens(seed, 13), header);
      }
    }
  }
}

TEST_F(SessionFilesTest, ALatentHasNoV) {
  ModelSpec spec = SpecOf("latent", 2, 1, 32);
  spec.geometry.groups[0].v_dim = 0;
  Start(spec);
  LlamaCppLayout layout;
  layout.bodies.resize(1);
  ExpectRoundTrip(MadeState(*model_, layout, 9, 3));
}

TEST_F(SessionFilesTest, AWindowWhoseCellsWentRoundKeepsTheirOrder) {
  Start(InterleavedSpec(8));
  LlamaCppLayout layout;
  layout.bodies.resize(1);
  const std::string file = MadeState(*model_, layout, 21, 5, /*with_turned_window=*/true);
  ExpectRoundTrip(file);
  const auto imported = Import(file);
  ASSERT_TRUE(imported.ok()) << imported.status();
  ASSERT_EQ(imported->layout().llama_cells_size(), 2);
  EXPECT_EQ(imported->layout().llama_cells(1).positions(0), 16u);
  // Cells that make no sense are refused, with what is wrong about them.
  for (const uint32_t position : {17u, 21u, ~0u}) {
    v1::FileLayout wrong = imported->layout();
    wrong.mutable_llama_cells(1)->set_positions(0, position);
    const absl::Status status =
        Export(imported->state().sequence_id(), v1::STATE_FORMAT_LLAMA_CPP, wrong).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("llama_cells"));
  }
  // Without them it is a file of the same state with its cells in order.
  v1::FileLayout plain = imported->layout();
  plain.clear_llama_cells();
  const auto ordered = Export(imported->state().sequence_id(), v1::STATE_FORMAT_LLAMA_CPP, plain);
  ASSERT_TRUE(ordered.ok()) << ordered.status();
  const auto second = Import(*ordered);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(RowsOf(second->state().sequence_id()), RowsOf(imported->state().sequence_id()));
}

TEST_F(SessionFilesTest, PromptCachesOfTheRealMlxComeOutAsTheyWentIn) {
  Start(SpecOf("mlx", 2, 2, 8));
  const std::vector<uint32_t> tokens = TestTokens(3, 7);
  for (const std::string name : {"mlx_v0_28_plain", "mlx_v0_32_plain"}) {
    SCOPED_TRACE(name);
    const std::string file = TestFile(name + ".safetensors");
    const auto imported = Import(file, tokens);
    ASSERT_TRUE(imported.ok()) << imported.status();
    EXPECT_EQ(imported->format(), v1::STATE_FORMAT_MLX);
    EXPECT_EQ(imported->layout().mlx_metadata().at("model"), "tiny");
    const auto again =
        Export(imported->state().sequence_id(), v1::STATE_FORMAT_MLX, imported->layout());
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(*again == file);
    // The same rows under a header of ours, and as another program's file.
    const auto made = Export(imported->state().sequence_id(), v1::STATE_FORMAT_MLX);
    ASSERT_TRUE(made.ok()) << made.status();
    const auto second = Import(*made, tokens);
    ASSERT_TRUE(second.ok()) << second.status();
    const auto through =
        Export(second->state().sequence_id(), v1::STATE_FORMAT_MLX, imported->layout());
    ASSERT_TRUE(through.ok()) << through.status();
    EXPECT_TRUE(*through == file);
  }
  EXPECT_TRUE(absl::IsInvalidArgument(
      Import(TestFile("mlx_v0_32_plain.safetensors")).status()));  // no tokens given
  // A ring that turned has dropped tokens.
  StartAfresh(SpecOf("mlx3", 2, 2, 8));
  const auto ring = Import(TestFile("mlx_v0_32_ring.safetensors"), TestTokens(3, 14));
  EXPECT_EQ(GetReason(ring.status()), "MODEL_MISMATCH");
}

TEST_F(SessionFilesTest, RingsOfTheRealMlxComeOutAsTheyWentIn) {
  using Type = LayerGroupSpec::WindowType;
  const std::vector<uint32_t> tokens = TestTokens(3, 14);
  for (const std::string version : {"mlx_v0_28", "mlx_v0_32"}) {
    SCOPED_TRACE(version);
    // Turned by single tokens; longer than its size after a prompt; not full yet.
    StartAfresh(WindowSpec(2, Type::kStandard, 8));
    ExpectRoundTrip(TestFile(version + "_ring.safetensors"), tokens);
    ExpectRoundTrip(TestFile(version + "_mixed.safetensors"), TestTokens(3, 5));
    StartAfresh(WindowSpec(1, Type::kStandard, 8));
    ExpectRoundTrip(TestFile(version + "_ring_prompt.safetensors"), tokens);
    // Another window, and none.
    for (const ModelSpec& other :
         {WindowSpec(2, Type::kStandard, 7), WindowSpec(2, Type::kChunked, 8)}) {
      StartAfresh(other);
      const Held before = WhatIsHeld();
      EXPECT_EQ(GetReason(Import(TestFile(version + "_ring.safetensors"), tokens).status()),
                "MODEL_MISMATCH");
      EXPECT_EQ(WhatIsHeld(), before);
    }
  }
}

TEST_F(SessionFilesTest, RingsThatKeepTheirFirstRowsComeOutAsTheyWentIn) {
  const std::vector<uint32_t> tokens = TestTokens(3, 14);
  for (const std::string name : {"mlx_v0_28_ring_keep", "mlx_v0_32_ring_keep"}) {
    SCOPED_TRACE(name);
    const std::string file = TestFile(name + ".safetensors");
    StartAfresh(RingSpec());
    const auto imported = Import(file, tokens);
    ASSERT_TRUE(imported.ok()) << imported.status();
    const auto again =
        Export(imported->state().sequence_id(), v1::STATE_FORMAT_MLX, imported->layout());
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(*again == file);
    for (const v1::StateFormat other : {v1::STATE_FORMAT_NATIVE, v1::STATE_FORMAT_LLAMA_CPP}) {
      EXPECT_EQ(GetReason(Export(imported->state().sequence_id(), other).status()),
                "CANNOT_EXPRESS");
    }
    // A model that sees the newest eight only would not see the first two.
    StartAfresh(WindowSpec(2, LayerGroupSpec::WindowType::kStandard, 8));
    EXPECT_EQ(GetReason(Import(file, tokens).status()), "MODEL_MISMATCH");
  }
}

TEST_F(SessionFilesTest, ChunksOfTheRealMlxComeOutAsTheyWentIn) {
  using Type = LayerGroupSpec::WindowType;
  StartAfresh(WindowSpec(1, Type::kChunked, 8));
  ExpectRoundTrip(TestFile("mlx_v0_28_chunked.safetensors"), TestTokens(3, 5));
  ExpectRoundTrip(TestFile("mlx_v0_32_chunked.safetensors"), TestTokens(3, 5));
  ExpectRoundTrip(TestFile("mlx_v0_32_chunked_trimmed.safetensors"), TestTokens(3, 12));
  // A model that sees all tokens lacks those that were trimmed.
  StartAfresh(SpecOf("full", 1, 2, 8));
  ExpectRoundTrip(TestFile("mlx_v0_32_chunked.safetensors"), TestTokens(3, 5));
  EXPECT_EQ(
      GetReason(
          Import(TestFile("mlx_v0_32_chunked_trimmed.safetensors"), TestTokens(3, 12)).status()),
      "MODEL_MISMATCH");
}

TEST_F(SessionFilesTest, QuantisedMlxRowsBecomePackedRows) {
  Start(PackedSpec());
  ExpectRoundTrip(TestFile("mlx_v0_28_quantized.safetensors"), TestTokens(1, 4));
  ExpectRoundTrip(TestFile("mlx_v0_32_quantized.safetensors"), TestTokens(1, 4));
  const auto imported = Import(TestFile("mlx_v0_32_quantized.safetensors"), TestTokens(1, 4));
  ASSERT_TRUE(imported.ok()) << imported.status();
  EXPECT_EQ(imported->state().length(), 4);
  // Nothing says how the bytes of a packed row are to be parted, but the layout of a file.
  EXPECT_EQ(GetReason(Export(imported->state().sequence_id(), v1::STATE_FORMAT_MLX).status()),
            "CANNOT_EXPRESS");
}

TEST_F(SessionFilesTest, LlamaSharpConversationComesOutAsItWentIn) {
  Start(LlamaSpec());
  const std::string file = LlamaSharpPrefix("{\"TokenCount\":20,\"Version\":1}", 0) +
                           TestFile("llama_cpp_v2_full_plain.mem");
  const auto imported = Import(file, LlamaTokens());
  ASSERT_TRUE(imported.ok()) << imported.status();
  EXPECT_EQ(imported->format(), v1::STATE_FORMAT_LLAMA_SHARP);
  const auto again =
      Export(imported->state().sequence_id(), v1::STATE_FORMAT_LLAMA_SHARP, imported->layout());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(*again == file);
  EXPECT_TRUE(absl::IsInvalidArgument(Import(file, TestTokens(1, 19)).status()));
}

}  // namespace
}  // namespace pagetide
