// What ExportSequence and ImportSequence promise beside the bytes of a format, through a real gRPC
// server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "tests/services/session_files_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

TEST_F(SessionFilesTest, KeysThatStillHaveToBeTurnedAreTurnedInTheFile) {
  ModelSpec spec = SpecOf("turned", 2, 2, 8, DataType::kF32, DataType::kF32);
  spec.geometry.groups[0].rope = {.style = RopeSpec::Style::kNeox, .n_rot = 8};
  Start(spec);
  const v1::SequenceState state = Filled(TestTokens(8, 40));
  TestContext context;
  v1::ShiftWindowRequest request;
  request.mutable_sequence()->set_sequence_id(state.sequence_id());
  request.mutable_sequence()->set_epoch(state.epoch());
  request.set_keep(4);
  request.set_discard(10);
  v1::ShiftWindowResponse response;
  const grpc::Status shifted = client_->edits().ShiftWindow(&context, request, &response);
  ASSERT_TRUE(shifted.ok()) << shifted.error_message();
  ASSERT_EQ(response.state().length(), 30);
  const std::string rows = RowsOf(state.sequence_id());
  for (const v1::StateFormat format :
       {v1::STATE_FORMAT_NATIVE, v1::STATE_FORMAT_LLAMA_CPP, v1::STATE_FORMAT_MLX}) {
    const auto file = Export(state.sequence_id(), format);
    ASSERT_TRUE(file.ok()) << file.status();
    std::vector<uint32_t> tokens = TestTokens(8, 40);
    tokens.erase(tokens.begin() + 4, tokens.begin() + 14);
    const auto imported =
        Import(*file, format == v1::STATE_FORMAT_MLX ? tokens : std::vector<uint32_t>());
    ASSERT_TRUE(imported.ok()) << imported.status();
    EXPECT_FALSE(imported->canonical());
    EXPECT_TRUE(RowsOf(imported->state().sequence_id()) == rows);
  }
  // Rows apart from each other are not a text without gaps.
  v1::RemoveRangeRequest remove;
  *remove.mutable_sequence() = request.sequence();
  remove.set_p0(5);
  remove.set_p1(9);
  v1::RemoveRangeResponse removed;
  TestContext second;
  ASSERT_TRUE(client_->edits().RemoveRange(&second, remove, &removed).ok());
  EXPECT_EQ(GetReason(Export(state.sequence_id(), v1::STATE_FORMAT_LLAMA_CPP).status()),
            "CANNOT_EXPRESS");
}

TEST_F(SessionFilesTest, AnImportedSequenceIsSavedAndLoaded) {
  Start(InterleavedSpec(8));
  const std::string file = TestFile("llama_cpp_v2_iswa.ggsq");
  const auto imported = Import(file);
  ASSERT_TRUE(imported.ok()) << imported.status();
  const std::string rows = RowsOf(imported->state().sequence_id());
  TestContext save_context, load_context;
  v1::SaveSessionRequest save;
  save.set_name("imported");
  save.mutable_sequence()->set_sequence_id(imported->state().sequence_id());
  save.mutable_sequence()->set_epoch(imported->state().epoch());
  v1::SaveSessionResponse saved;
  grpc::Status status = sessions_->SaveSession(&save_context, save, &saved);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(saved.canonical_length(), 0);
  v1::LoadSessionRequest load;
  load.set_name("imported");
  v1::LoadSessionResponse loaded;
  status = sessions_->LoadSession(&load_context, load, &loaded);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(loaded.state().canonical_length(), 0);
  EXPECT_TRUE(RowsOf(loaded.state().sequence_id()) == rows);
  const auto again =
      Export(loaded.state().sequence_id(), v1::STATE_FORMAT_LLAMA_CPP, imported->layout());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(*again == file);
}

TEST_F(SessionFilesTest, APromptWithTheTokensOfAnImportMisses) {
  Start(LlamaSpec());
  const auto imported = Import(TestFile("llama_cpp_v2_full_plain.ggsq"));
  ASSERT_TRUE(imported.ok()) << imported.status();
  std::vector<uint32_t> prompt = LlamaTokens();
  prompt.push_back(1);
  EXPECT_EQ(ReusedBy(prompt), 0);
  // Rows appended to it are private too: they were computed over rows of strangers.
  v1::SequenceState state = imported->state();
  auto appended = client_->Append(state, prompt, prompt.size());
  ASSERT_TRUE(appended.ok()) << appended.status();
  EXPECT_EQ(appended->state().canonical_length(), 0);
  EXPECT_EQ(ReusedBy(prompt), 0);
}

TEST_F(SessionFilesTest, ANativeFileOfThisDeploymentIsSharedAgain) {
  Start(LlamaSpec());
  const std::vector<uint32_t> tokens = TestTokens(9, 30);
  const v1::SequenceState state = Filled(tokens);
  const auto file = Export(state.sequence_id(), v1::STATE_FORMAT_NATIVE);
  ASSERT_TRUE(file.ok()) << file.status();

  // Another life of the fleet, with an empty store.
  StartAfresh(LlamaSpec());
  EXPECT_EQ(ReusedBy(tokens), 0);
  const auto imported = Import(*file);
  ASSERT_TRUE(imported.ok()) << imported.status();
  EXPECT_TRUE(imported->canonical());
  EXPECT_EQ(imported->state().canonical_length(), 30);
  EXPECT_EQ(ReusedBy(tokens), 28);  // seven pages; one row of the eighth is too few
  EXPECT_TRUE(client_->Verify(imported->state().sequence_id(), tokens, 0, 30).ok());
  const auto again = Export(imported->state().sequence_id(), v1::STATE_FORMAT_NATIVE);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(*again == *file);

  // Another deployment reads the rows, but nothing proves to it where they come from.
  StartAfresh(LlamaSpec(), "another secret");
  const auto foreign = Import(*file);
  ASSERT_TRUE(foreign.ok()) << foreign.status();
  EXPECT_FALSE(foreign->canonical());
  EXPECT_EQ(foreign->state().canonical_length(), 0);
  EXPECT_EQ(ReusedBy(tokens), 0);
  EXPECT_TRUE(client_->Verify(foreign->state().sequence_id(), tokens, 0, 30).ok());
}

TEST_F(SessionFilesTest, ANativeFileOfAPrivateSequenceStaysPrivate) {
  Start(LlamaSpec());
  const auto imported = Import(TestFile("llama_cpp_v2_full_plain.ggsq"));
  ASSERT_TRUE(imported.ok()) << imported.status();
  const auto file = Export(imported->state().sequence_id(), v1::STATE_FORMAT_NATIVE);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto again = Import(*file);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_FALSE(again->canonical());
  EXPECT_EQ(ReusedBy(LlamaTokens()), 0);
}

TEST_F(SessionFilesTest, ABrokenFileLeavesNothing) {
  Start(LlamaSpec());
  const auto state = Filled(TestTokens(4, 20));
  const auto native = Export(state.sequence_id(), v1::STATE_FORMAT_NATIVE);
  ASSERT_TRUE(native.ok()) << native.status();
  const Held before = WhatIsHeld();
  const std::string rows = RowsOf(state.sequence_id());
  const std::string sharp = LlamaSharpPrefix("", 20) + TestFile("llama_cpp_v2_full_plain.mem");
  for (const std::string& file : {TestFile("llama_cpp_v2_full_plain.ggsq"), sharp,
                                  TestFile("mlx_v0_32_plain.safetensors"), *native}) {
    for (const size_t keep : {file.size() - 1, file.size() / 2, size_t{9}}) {
      const auto cut = Import(file.substr(0, keep), TestTokens(1, file == sharp ? 20 : 7));
      EXPECT_TRUE(absl::IsDataLoss(cut.status())) << keep << ": " << cut.status();
    }
  }
  std::string changed = *native;
  changed[changed.size() / 2] ^= 1;
  EXPECT_TRUE(absl::IsDataLoss(Import(changed).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Import("no file at all").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Import("").status()));
  // Counts of 2^31 and sizes that overflow, in places where the file has counts: nothing of that
  // size is allocated, which a worker of little memory would not survive.
  const std::string ggsq = TestFile("llama_cpp_v2_full_plain.ggsq");
  for (const size_t at : {size_t{8}, size_t{12 + 80}, size_t{12 + 84}, size_t{12 + 84 + 244}}) {
    for (const uint32_t value : {0x7fffffffu, 0x80000000u, 0xffffffffu}) {
      std::string hostile = ggsq;
      std::memcpy(hostile.data() + at, &value, 4);
      const absl::Status status = Import(hostile).status();
      EXPECT_TRUE(absl::IsDataLoss(status) || absl::IsInvalidArgument(status))
          << at << ": " << status;
    }
  }
  std::string huge = TestFile("mlx_v0_32_plain.safetensors");
  const uint64_t header_bytes = ~uint64_t{0} >> 1;
  std::memcpy(huge.data(), &header_bytes, 8);
  v1::ImportSequenceRequest::Header mlx;
  mlx.set_format(v1::STATE_FORMAT_MLX);
  EXPECT_TRUE(absl::IsDataLoss(Import(huge, TestTokens(1, 7), mlx).status()));
  EXPECT_EQ(WhatIsHeld(), before);
  EXPECT_TRUE(RowsOf(state.sequence_id()) == rows);
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_imports_refused_total", 20));
}

TEST_F(SessionFilesTest, AnImportMakesRoomInAFullPool) {
  Start(SpecOf("big", 2, 1, 32));
  // The pool is 64 pages of 4 tokens.
  const std::vector<uint32_t> tokens = TestTokens(5, 200);
  const auto state = Filled(tokens);
  const auto file = Export(state.sequence_id(), v1::STATE_FORMAT_NATIVE);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto imported = Import(*file);
  // 50 of 64 frames are taken: others spill.
  ASSERT_TRUE(imported.ok()) << imported.status();
  EXPECT_TRUE(client_->Verify(imported->state().sequence_id(), tokens, 0, 200).ok());
}

TEST_F(SessionFilesTest, AnotherGeometryIsRefusedWithWhatDiffers) {
  const std::string file = TestFile("llama_cpp_v2_full_plain.ggsq");
  const struct {
    ModelSpec spec;
    const char* text;
  } cases[] = {
      {SpecOf("layers", 3, 1, 32), "body 0 has 2 layers, the model has 3"},
      {SpecOf("width", 2, 1, 64), "K of layer 0 is 32 × f16, the model has 64 × f16"},
      {SpecOf("type", 2, 1, 32, DataType::kBF16),
       "K of layer 0 is 32 × f16, the model has 32 × bf16"},
  };
  for (const auto& c : cases) {
    StartAfresh(c.spec);
    const Held before = WhatIsHeld();
    const absl::Status status = Import(file).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(GetReason(status), "MODEL_MISMATCH");
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.text));
    EXPECT_EQ(WhatIsHeld(), before);
  }
  // Native: the other model's fingerprint.
  StartAfresh(LlamaSpec());
  const auto native = Export(Filled(TestTokens(1, 9)).sequence_id(), v1::STATE_FORMAT_NATIVE);
  ASSERT_TRUE(native.ok()) << native.status();
  StartAfresh(SpecOf("other", 2, 1, 64));
  const absl::Status status = Import(*native).status();
  EXPECT_EQ(GetReason(status), "MODEL_MISMATCH");
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer group 0 differs"));
}

TEST_F(SessionFilesTest, WhatAFormatCannotHoldIsNotExported) {
  ModelSpec rotated = LlamaSpec();
  rotated.geometry.groups[0].basis = LayerGroupSpec::Basis::kHadamard;
  Start(rotated);
  v1::SequenceState state = Filled(TestTokens(2, 5));
  for (const v1::StateFormat format :
       {v1::STATE_FORMAT_LLAMA_CPP, v1::STATE_FORMAT_MLX, v1::STATE_FORMAT_LLAMA_SHARP}) {
    const absl::Status status = Export(state.sequence_id(), format).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(GetReason(status), "CANNOT_EXPRESS");
    EXPECT_THAT(std::string(status.message()), HasSubstr("Hadamard"));
  }
  EXPECT_TRUE(Export(state.sequence_id(), v1::STATE_FORMAT_NATIVE).ok());
  StartAfresh(SpecOf("fp8", 2, 1, 32, DataType::kF8E4M3, DataType::kF8E4M3));
  state = Filled(TestTokens(2, 5));
  EXPECT_TRUE(
      absl::IsFailedPrecondition(Export(state.sequence_id(), v1::STATE_FORMAT_LLAMA_CPP).status()));
  EXPECT_TRUE(
      absl::IsFailedPrecondition(Export(state.sequence_id(), v1::STATE_FORMAT_MLX).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      Export(state.sequence_id(), static_cast<v1::StateFormat>(9)).status()));
}

TEST_F(SessionFilesTest, BadRequestsChangeNothing) {
  Start(LlamaSpec());
  const Held before = WhatIsHeld();
  const std::string file = TestFile("llama_cpp_v2_full_plain.ggsq");
  // Other tokens than the file's; a model that nobody knows; a file above the limit of 1 MiB.
  EXPECT_TRUE(absl::IsInvalidArgument(Import(file, TestTokens(1, 20)).status()));
  v1::ImportSequenceRequest::Header unknown;
  unknown.set_model_digest(std::string(64, 'a'));
  EXPECT_TRUE(absl::IsNotFound(Import(file, {}, unknown).status()));
  const absl::Status large = Import(std::string((1 << 20) + 1, 'x'), {}, {}, 500000).status();
  EXPECT_TRUE(absl::IsResourceExhausted(large)) << large;
  EXPECT_EQ(GetReason(large), "FILE_TOO_LARGE");
  const absl::Status part = Import(std::string((1 << 20) + 1, 'x'), {}, {}, 2 << 20).status();
  EXPECT_TRUE(absl::IsInvalidArgument(part)) << part;
  EXPECT_EQ(WhatIsHeld(), before);
  // No header.
  TestContext context;
  v1::ImportSequenceResponse response;
  const auto stream = sessions_->ImportSequence(&context, &response);
  v1::ImportSequenceRequest message;
  message.set_data("x");
  stream->Write(message);
  stream->WritesDone();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(SessionFilesTest, ARepeatedRequestGivesTheFirstAnswer) {
  Start(LlamaSpec());
  v1::ImportSequenceRequest::Header header;
  header.set_request_id("once");
  const std::string file = TestFile("llama_cpp_v2_full_plain.ggsq");
  const auto first = Import(file, {}, header);
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = Import(file, {}, header);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->state().sequence_id(), first->state().sequence_id());
  header.set_format(v1::STATE_FORMAT_NATIVE);
  EXPECT_TRUE(absl::IsInvalidArgument(Import(file, {}, header).status()));
}

TEST_F(SessionFilesTest, AStreamThatBreaksLeavesNothing) {
  Start(LlamaSpec());
  const Held before = WhatIsHeld();
  {
    TestContext context;
    v1::ImportSequenceResponse response;
    const auto stream = sessions_->ImportSequence(&context, &response);
    v1::ImportSequenceRequest message;
    message.mutable_header()->set_model_digest(model_->digest().ToHex());
    ASSERT_TRUE(stream->Write(message));
    message.Clear();
    // Short of its end, so that it is refused even if the break is seen late.
    const std::string file = TestFile("llama_cpp_v2_full_plain.ggsq");
    message.set_data(file.substr(0, file.size() - 100));
    ASSERT_TRUE(stream->Write(message));
    context.TryCancel();
    EXPECT_FALSE(stream->Finish().ok());
  }
  // The handler ends on its own time; nothing may be left when it has.
  EXPECT_TRUE(testing::Eventually([&] { return WhatIsHeld() == before; }));
  EXPECT_EQ(ReusedBy(LlamaTokens()), 0);
}

}  // namespace
}  // namespace pagetide
