// What streams of files may not do to others: hold places without sending, or all places at once.
// Through a real gRPC server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "tests/services/session_files_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

class SessionFilesLimitsTest : public SessionFilesTest {
 protected:
  // An import that is open; nothing of it is sent but what the caller sends.
  struct OpenImport {
    explicit OpenImport(absl::Duration timeout) : context(timeout) {}
    TestContext context;
    v1::ImportSequenceResponse response;
    std::unique_ptr<grpc::ClientWriter<v1::ImportSequenceRequest>> stream;
  };
  std::unique_ptr<OpenImport> BeginImport(absl::Duration timeout = absl::Seconds(120)) {
    auto import = std::make_unique<OpenImport>(timeout);
    import->stream = sessions_->ImportSequence(&import->context, &import->response);
    return import;
  }
  // One that has its place.
  std::unique_ptr<OpenImport> TakePlace(absl::Duration timeout = absl::Seconds(120)) {
    auto import = BeginImport(timeout);
    EXPECT_TRUE(import->stream->Write(Header()));
    import->stream->WaitForInitialMetadata();
    return import;
  }
  v1::ImportSequenceRequest Header(const std::string& request_id = "") {
    v1::ImportSequenceRequest message;
    message.mutable_header()->set_model_digest(model_->digest().ToHex());
    message.mutable_header()->set_request_id(request_id);
    return message;
  }
  // Answered at once, whatever the limits let in.
  absl::Status TryToImport() {
    v1::ImportSequenceRequest::Header unknown;
    unknown.set_model_digest(std::string(64, 'a'));
    return Import("x", {}, unknown).status();
  }
};

TEST_F(SessionFilesLimitsTest, AnImportThatSendsNothingEndsWithAClearAnswer) {
  max_idle_ = absl::Seconds(10);  // time enough to send what is sent
  Start(LlamaSpec());
  const Held before = WhatIsHeld();
  const std::string file = TestFile("llama_cpp_v2_full_plain.ggsq");
  // Silent from the first message on, behind the header, and in the middle of the file.
  std::vector<std::unique_ptr<OpenImport>> imports;
  for (int sent = 0; sent < 3; ++sent) {
    imports.push_back(BeginImport());
    if (sent > 0) {
      ASSERT_TRUE(imports.back()->stream->Write(Header(absl::StrCat("r", sent))));
    }
    if (sent < 2) continue;
    v1::ImportSequenceRequest part;
    part.set_data(file.substr(0, 100));
    ASSERT_TRUE(imports.back()->stream->Write(part));
  }
  const char* const kTexts[] = {"import sequence: nothing came for 10s behind byte 0",
                                "import sequence r1: nothing came for 10s behind byte 0",
                                "import sequence r2: nothing came for 10s behind byte 100"};
  for (size_t i = 0; i < imports.size(); ++i) {
    const absl::Status ended = FromGrpcStatus(imports[i]->stream->Finish());
    EXPECT_TRUE(absl::IsDeadlineExceeded(ended)) << ended;
    EXPECT_EQ(GetReason(ended), "IMPORT_IDLE");
    EXPECT_THAT(std::string(ended.message()), HasSubstr(kTexts[i]));
  }
  EXPECT_EQ(WhatIsHeld(), before);
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_imports_refused_total", 3));
  // Their places are free, and the same request may come again.
  v1::ImportSequenceRequest::Header again;
  again.set_request_id("r2");
  EXPECT_TRUE(testing::Eventually([&] { return Import(file, {}, again).ok(); }));
}

TEST_F(SessionFilesLimitsTest, OneTenantHasHalfThePlacesForImports) {
  Start(LlamaSpec());
  std::vector<std::unique_ptr<OpenImport>> imports;
  for (int i = 0; i < 4; ++i) imports.push_back(TakePlace());
  const absl::Status fifth = TryToImport();
  EXPECT_EQ(GetReason(fifth), "TOO_MANY_IMPORTS") << fifth;
  EXPECT_TRUE(absl::IsResourceExhausted(fifth));
  EXPECT_THAT(std::string(fifth.message()),
              HasSubstr("4 imports of this tenant are running, the limit is 4"));
  // What was going on goes on.
  const std::string file = TestFile("llama_cpp_v2_full_plain.ggsq");
  v1::ImportSequenceRequest part;
  part.set_data(file);
  ASSERT_TRUE(imports[0]->stream->Write(part));
  imports[0]->stream->WritesDone();
  const grpc::Status done = imports[0]->stream->Finish();
  EXPECT_TRUE(done.ok()) << done.error_message();
  EXPECT_EQ(imports[0]->response.file_bytes(), file.size());
  for (size_t i = 1; i < imports.size(); ++i) {
    imports[i]->context.TryCancel();
    EXPECT_FALSE(imports[i]->stream->Finish().ok());
  }
  EXPECT_TRUE(testing::Eventually([&] { return absl::IsNotFound(TryToImport()); }));
}

TEST_F(SessionFilesLimitsTest, AnImportWhoseCallersTimeIsUpGivesItsPlaceBack) {
  max_idle_ = absl::Hours(1);
  Start(LlamaSpec());
  std::vector<std::unique_ptr<OpenImport>> imports;
  for (int i = 0; i < 4; ++i) {
    imports.push_back(BeginImport(absl::Seconds(1)));
    imports.back()->stream->Write(Header());
  }
  for (const auto& import : imports) {
    const grpc::Status ended = import->stream->Finish();
    EXPECT_EQ(ended.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << ended.error_message();
  }
  absl::Status next;
  EXPECT_TRUE(testing::Eventually([&] {
    next = TryToImport();
    return absl::IsNotFound(next);  // of a model that nobody knows: it was let in
  })) << next;
}

TEST_F(SessionFilesLimitsTest, AStopDoesNotWaitForAnImportThatSendsNothing) {
  max_idle_ = absl::Hours(1);
  Start(LlamaSpec());
  const auto import = TakePlace();
  role_->Drain(absl::ZeroDuration());
  const grpc::Status ended = import->stream->Finish();
  EXPECT_FALSE(ended.ok());
  EXPECT_NE(ended.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << ended.error_message();
  client_.reset();
  role_.reset();
}

TEST_F(SessionFilesLimitsTest, OneTenantHasHalfThePlacesForExports) {
  // 16 MiB a file: more than a connection takes without a reader.
  Start(SpecOf("wide", 2, 1, 4096, DataType::kF32, DataType::kF32));
  const v1::SequenceState state = Filled(TestTokens(6, 250));
  struct OpenExport {
    TestContext context;
    std::unique_ptr<grpc::ClientReaderInterface<v1::ExportSequenceResponse>> stream;
  };
  v1::ExportSequenceRequest request;
  request.set_sequence_id(state.sequence_id());
  request.set_format(v1::STATE_FORMAT_NATIVE);
  std::vector<std::unique_ptr<OpenExport>> exports;
  for (int i = 0; i < 4; ++i) {
    exports.push_back(std::make_unique<OpenExport>());
    exports.back()->stream = sessions_->ExportSequence(&exports.back()->context, request);
    v1::ExportSequenceResponse header;
    ASSERT_TRUE(exports.back()->stream->Read(&header));  // it has begun
    EXPECT_GT(header.header().total_bytes(), 15 << 20);
  }
  const absl::Status fifth = Export(state.sequence_id(), v1::STATE_FORMAT_NATIVE).status();
  EXPECT_EQ(GetReason(fifth), "TOO_MANY_EXPORTS") << fifth;
  EXPECT_THAT(std::string(fifth.message()),
              HasSubstr("4 exports of this tenant are running, the limit is 4"));
  for (const auto& one : exports) {
    one->context.TryCancel();
    EXPECT_FALSE(one->stream->Finish().ok());
  }
  EXPECT_TRUE(testing::Eventually(
      [&] { return Export(state.sequence_id(), v1::STATE_FORMAT_NATIVE).ok(); }));
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_exports_refused_total", 1));
}

}  // namespace
}  // namespace pagetide
