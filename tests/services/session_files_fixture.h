// Sequences as files through a real gRPC server on loopback: what the tests of ExportSequence and
// ImportSequence share.
#ifndef PAGETIDE_TESTS_SERVICES_SESSION_FILES_FIXTURE_H_
#define PAGETIDE_TESTS_SERVICES_SESSION_FILES_FIXTURE_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "core/sequence_rows.h"
#include "formats/llama_cpp.h"
#include "formats/llama_sharp.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/formats/format_test_util.h"
#include "tests/services/session_files_models.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {

using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

class SessionFilesTest : public ::testing::Test {
 protected:
  // A worker over an empty store.
  void StartAfresh(const ModelSpec& spec, const std::string& secret = "a secret of tests") {
    client_.reset();
    role_.reset();
    store_ = std::make_unique<MemoryPageStore>();
    Start(spec, secret);
  }
  void Start(const ModelSpec& spec, const std::string& secret = "a secret of tests") {
    client_.reset();
    role_.reset();
    auto model = Model::Create(spec);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = std::make_shared<const Model>(*std::move(model));
    ASSERT_TRUE(RegisterTestModel(*model_, store_.get()).ok());
    WorkerRole::Options options;
    options.worker.pool_bytes = 64 * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = secret;
    options.file_limits.folder = dir_.path();
    options.file_limits.max_bytes = 1 << 20;
    options.file_limits.max_idle = max_idle_;
    auto role = WorkerRole::Start(options, store_.get(), Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
    sessions_ = v1::SessionService::NewStub(client_->channel());
    admin_ = v1::AdminService::NewStub(client_->channel());
    // Makes the model's pool. On a busy machine a first attempt to connect may end before it is
    // accepted.
    auto open = client_->Open({});
    EXPECT_TRUE(testing::Eventually([&] {
      if (absl::IsUnavailable(open.status())) open = client_->Open({});
      return !absl::IsUnavailable(open.status());
    }));
    ASSERT_TRUE(open.ok()) << open.status();
    ASSERT_TRUE(client_->Close(open->state()).ok());
  }

  absl::StatusOr<v1::ImportSequenceResponse> Import(const std::string& file,
                                                    const std::vector<uint32_t>& tokens = {},
                                                    v1::ImportSequenceRequest::Header header = {},
                                                    size_t part_bytes = 1000) {
    TestContext context;
    v1::ImportSequenceResponse response;
    const auto stream = sessions_->ImportSequence(&context, &response);
    v1::ImportSequenceRequest message;
    if (header.model_digest().empty()) header.set_model_digest(model_->digest().ToHex());
    header.mutable_tokens()->Add(tokens.begin(), tokens.end());
    *message.mutable_header() = header;
    bool is_open = stream->Write(message);
    message.Clear();
    for (size_t at = 0; is_open && at < file.size(); at += part_bytes) {
      message.set_data(file.substr(at, part_bytes));
      is_open = stream->Write(message);
    }
    if (is_open) stream->WritesDone();
    const grpc::Status status = stream->Finish();
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }

  absl::StatusOr<std::string> Export(const std::string& sequence_id, v1::StateFormat format,
                                     const v1::FileLayout& layout = {}) {
    TestContext context;
    v1::ExportSequenceRequest request;
    request.set_sequence_id(sequence_id);
    request.set_format(format);
    *request.mutable_layout() = layout;
    const auto stream = sessions_->ExportSequence(&context, request);
    v1::ExportSequenceResponse message;
    std::string file;
    uint64_t announced = 0;
    while (stream->Read(&message)) {
      if (message.has_header()) announced = message.header().total_bytes();
      EXPECT_LE(message.data().size(), 1 << 20);
      file += message.data();
    }
    const grpc::Status status = stream->Finish();
    if (!status.ok()) return FromGrpcStatus(status);
    EXPECT_EQ(file.size(), announced);
    return file;
  }

  struct Held {
    uint64_t free_frames = 0;
    int sequences = 0;
    friend bool operator==(const Held&, const Held&) = default;
  };
  Held WhatIsHeld() {
    Held held;
    TestContext context, second;
    v1::GetMemoryBreakdownResponse memory;
    EXPECT_TRUE(admin_->GetMemoryBreakdown(&context, {}, &memory).ok());
    for (const auto& pool : memory.pools()) held.free_frames += pool.free_frames();
    v1::ListWorkerSequencesResponse list;
    EXPECT_TRUE(client_->sequences().ListWorkerSequences(&second, {}, &list).ok());
    held.sequences = list.sequences_size();
    return held;
  }
  // Every byte of a sequence's rows that its groups hold: by group, layer, K and V.
  std::string RowsOf(const std::string& sequence_id) {
    std::string all;
    const auto& geometry = model_->geometry();
    for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
      TestContext context;
      v1::ReadRowsRequest request;
      request.set_sequence_id(sequence_id);
      request.set_group(g);
      const LayerGroupSpec& spec = geometry.group(g).spec();
      if (spec.kind == LayerGroupSpec::Kind::kWindow) {
        const auto state = client_->Get(sequence_id);
        EXPECT_TRUE(state.ok()) << state.status();
        request.set_begin(static_cast<uint64_t>(
            TraitsOf(spec).FirstVisible(static_cast<int64_t>(state->length()))));
      }
      const auto reader = client_->sequences().ReadRows(&context, request);
      v1::ReadRowsResponse part;
      while (reader->Read(&part)) all += part.data();
      const grpc::Status status = reader->Finish();
      EXPECT_TRUE(status.ok()) << status.error_message();
    }
    return all;
  }
  // In and out again, with the layout that the import told.
  void ExpectRoundTrip(const std::string& file, const std::vector<uint32_t>& tokens = {},
                       const v1::ImportSequenceRequest::Header& header = {}) {
    const auto imported = Import(file, tokens, header);
    ASSERT_TRUE(imported.ok()) << imported.status();
    EXPECT_EQ(imported->file_bytes(), file.size());
    EXPECT_EQ(imported->state().canonical_length(), 0);
    const auto again =
        Export(imported->state().sequence_id(), imported->format(), imported->layout());
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(*again == file) << "of " << file.size() << " bytes";
    // By way of PageTide's own file.
    const auto native = Export(imported->state().sequence_id(), v1::STATE_FORMAT_NATIVE);
    ASSERT_TRUE(native.ok()) << native.status();
    const auto moved = Import(*native);
    ASSERT_TRUE(moved.ok()) << moved.status();
    EXPECT_FALSE(moved->canonical());
    const auto through =
        Export(moved->state().sequence_id(), imported->format(), imported->layout());
    ASSERT_TRUE(through.ok()) << through.status();
    EXPECT_TRUE(*through == file);
    for (const auto& state : {imported->state(), moved->state()}) {
      EXPECT_TRUE(client_->Close(state).ok());
    }
  }
  uint64_t ReusedBy(const std::vector<uint32_t>& prompt) {
    const auto open = client_->Open(prompt);
    EXPECT_TRUE(open.ok()) << open.status();
    if (!open.ok()) return 0;
    EXPECT_TRUE(client_->Close(open->state()).ok());
    return open->reuse().reused_tokens();
  }
  // A sequence of the test's own rows.
  v1::SequenceState Filled(const std::vector<uint32_t>& tokens) {
    const auto open = client_->Open({});
    EXPECT_TRUE(open.ok()) << open.status();
    const auto appended = client_->Append(open->state(), tokens, tokens.size());
    EXPECT_TRUE(appended.ok()) << appended.status();
    return appended.ok() ? appended->state() : v1::SequenceState();
  }

  absl::Duration max_idle_ = absl::Minutes(2);  // of imports, for what is started next
  testing::TempDir dir_;
  std::unique_ptr<MemoryPageStore> store_ = std::make_unique<MemoryPageStore>();
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
  std::unique_ptr<v1::SessionService::Stub> sessions_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_SERVICES_SESSION_FILES_FIXTURE_H_
