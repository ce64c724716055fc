// Workers of several ranks over one store, and something in front of one of them that loses and
// changes what it is told to.
#ifndef PAGETIDE_TESTS_SERVICES_SHARD_GROUP_FIXTURE_H_
#define PAGETIDE_TESTS_SERVICES_SHARD_GROUP_FIXTURE_H_

#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "kvstore/decorating_page_store.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/shard_group.grpc.pb.h"
#include "pagetide/v1/transfer.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide::shard_group_test {

using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestModelOptions;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

inline constexpr uint64_t kFrames = 32;
inline constexpr uint32_t kPageTokens = 16;

// `is_replicated`: every rank holds the same heads.
inline std::shared_ptr<const Model> RankModel(uint32_t rank, uint32_t num_ranks,
                                              bool is_replicated = false,
                                              const TestModelOptions& options = {}) {
  ModelSpec spec = MakeTestModel(options).spec();
  ShardSpec& shard = spec.geometry.shard;
  shard.rank = rank;
  shard.num_ranks = num_ranks;
  if (!is_replicated) {
    shard.kv_head_begin = rank * options.kv_heads;
    shard.kv_head_end = (rank + 1) * options.kv_heads;
  }
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

// Counts the pages that are read, and loses what it is told to.
class CountingStore final : public DecoratingPageStore {
 public:
  explicit CountingStore(PageStore* inner) : DecoratingPageStore(inner) {}
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override {
    num_read += pages.size();
    return inner()->GetPages(pages, deadline);
  }
  absl::StatusOr<StoreRecord> GetRecord(absl::string_view kind, absl::string_view key,
                                        MonotonicTime deadline) override {
    if (kind == "model") {
      ++num_model_reads;
      if (deadline - Clock::Real()->MonotonicNow() > absl::Seconds(10)) ++num_late_model_reads;
    }
    if (lose_models && kind == "model") return absl::UnavailableError("lost");
    return inner()->GetRecord(kind, key, deadline);
  }
  absl::Status DeleteManifest(absl::string_view name, uint64_t expected_version,
                              const std::optional<WriteFence>& fence,
                              MonotonicTime deadline) override {
    if (lose_deletes) return absl::UnavailableError("lost");
    return inner()->DeleteManifest(name, expected_version, fence, deadline);
  }
  std::atomic<uint64_t> num_read{0};
  std::atomic<int> num_model_reads{0};
  std::atomic<int> num_late_model_reads{0};  // might have taken more than 10 s
  std::atomic<bool> lose_models{false};
  std::atomic<bool> lose_deletes{false};
};

// Stands in front of a member: forwards what rank 0 asks for, and loses or changes what it is told
// to.
class LossyMember final {
 public:
  explicit LossyMember(const std::string& target) : target_(target) {
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(&prefixes_);
    builder.RegisterService(&sequences_);
    builder.RegisterService(&edits_);
    builder.RegisterService(&groups_);
    server_ = builder.BuildAndStart();
  }
  ~LossyMember() { server_->Shutdown(std::chrono::system_clock::now()); }
  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

  std::atomic<bool> lose_all{false};      // on the way there
  std::atomic<int> lose_open_answers{0};  // of so many opens
  std::atomic<uint64_t> claim_tokens{0};  // of look-ups: at least so many, in so many calls
  std::atomic<int> claims_left{0};
  std::atomic<int> one_less_left{0};  // of so many look-ups: one less than it knows
  std::atomic<int> num_lookups{0};
  std::atomic<bool> lose_rewind{false};
  // Until told otherwise, or their caller leaves.
  std::atomic<bool> hold_opens{false};
  std::atomic<bool> hold_lookups{false};
  std::atomic<bool> hold_acknowledgements{false};
  std::atomic<int> num_opens{0};
  std::atomic<bool> lie_about_id{false};  // an id that is none, and large
  std::atomic<bool> say_too_much{false};

 private:
  static grpc::Status Lost() { return {grpc::StatusCode::UNAVAILABLE, "lost on the way"}; }
  static grpc::Status Hold(const std::atomic<bool>& hold, const grpc::ServerContext& call) {
    Eventually([&] { return !hold || call.IsCancelled(); });
    return call.IsCancelled() ? grpc::Status::CANCELLED : grpc::Status::OK;
  }
  // One byte more, so that the bound falls into a character.
  static std::string LongText() {
    std::string text = "x";
    for (int i = 0; i < 100'000; ++i) text += "ä";
    return text;
  }
  void Change(v1::SequenceState* state) const {
    if (lie_about_id) state->set_sequence_id(LongText());
    if (!say_too_much) return;
    state->set_worker_id(LongText());
    state->set_model_digest(LongText());
    state->GetReflection()->MutableUnknownFields(state)->AddLengthDelimited(1000, LongText());
  }

  class Prefixes final : public v1::PrefixService::Service {
   public:
    explicit Prefixes(LossyMember* member) : member_(member) {}
    grpc::Status LookupPrefix(grpc::ServerContext* call, const v1::LookupPrefixRequest* request,
                              v1::LookupPrefixResponse* response) override {
      ++member_->num_lookups;
      if (const auto held = Hold(member_->hold_lookups, *call); !held.ok()) return held;
      if (member_->lose_all) return Lost();
      TestContext context;
      const auto stub = v1::PrefixService::NewStub(MakeChannel(member_->target_));
      const grpc::Status status = stub->LookupPrefix(&context, *request, response);
      if (status.ok() && member_->one_less_left.fetch_sub(1) > 0) {
        response->mutable_reuse()->set_reused_tokens(response->reuse().reused_tokens() - 1);
      }
      if (status.ok() && member_->claims_left.fetch_sub(1) > 0) {
        response->mutable_reuse()->set_reused_tokens(
            std::min<uint64_t>(member_->claim_tokens, request->tokens_size()));
      }
      if (member_->say_too_much) response->mutable_reuse()->set_explanation(LongText());
      return status;
    }
    LossyMember* const member_;
  };
  class Sequences final : public v1::SequenceService::Service {
   public:
    explicit Sequences(LossyMember* member) : member_(member) {}
    grpc::Status OpenSequence(grpc::ServerContext* call, const v1::OpenSequenceRequest* request,
                              v1::OpenSequenceResponse* response) override {
      ++member_->num_opens;
      if (const auto held = Hold(member_->hold_opens, *call); !held.ok()) return held;
      if (member_->lose_all) return Lost();
      TestContext context;
      const auto stub = v1::SequenceService::NewStub(MakeChannel(member_->target_));
      const grpc::Status status = stub->OpenSequence(&context, *request, response);
      member_->Change(response->mutable_state());
      return member_->lose_open_answers.fetch_sub(1) > 0 ? Lost() : status;
    }
    grpc::Status CloseSequence(grpc::ServerContext*, const v1::CloseSequenceRequest* request,
                               v1::CloseSequenceResponse* response) override {
      if (member_->lose_all) return Lost();
      TestContext context;
      const auto stub = v1::SequenceService::NewStub(MakeChannel(member_->target_));
      return stub->CloseSequence(&context, *request, response);
    }
    LossyMember* const member_;
  };
  class Edits final : public v1::SequenceEditService::Service {
   public:
    explicit Edits(LossyMember* member) : member_(member) {}
    grpc::Status Rewind(grpc::ServerContext*, const v1::RewindRequest* request,
                        v1::RewindResponse* response) override {
      if (member_->lose_all || member_->lose_rewind) return Lost();
      TestContext context;
      const auto stub = v1::SequenceEditService::NewStub(MakeChannel(member_->target_));
      return stub->Rewind(&context, *request, response);
    }
    LossyMember* const member_;
  };
  class Groups final : public v1::ShardGroupService::Service {
   public:
    explicit Groups(LossyMember* member) : member_(member) {}
    grpc::Status AcknowledgeShard(grpc::ServerContext* call,
                                  const v1::AcknowledgeShardRequest* request,
                                  v1::AcknowledgeShardResponse* response) override {
      if (const auto held = Hold(member_->hold_acknowledgements, *call); !held.ok()) return held;
      if (member_->lose_all) return Lost();
      TestContext context;
      const auto stub = v1::ShardGroupService::NewStub(MakeChannel(member_->target_));
      const grpc::Status status = stub->AcknowledgeShard(&context, *request, response);
      member_->Change(response->mutable_state());
      return status;
    }
    LossyMember* const member_;
  };

  const std::string target_;
  Prefixes prefixes_{this};
  Sequences sequences_{this};
  Edits edits_{this};
  Groups groups_{this};
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

struct RankUnderTest {
  std::shared_ptr<const Model> model;
  std::unique_ptr<CountingStore> store;
  std::unique_ptr<WorkerRole> role;
  std::unique_ptr<WorkerClient> client;
  std::string address;  // that rank 0 is told

  uint64_t FreeFrames() {
    TestContext context;
    v1::GetMemoryBreakdownResponse response;
    EXPECT_TRUE(client->admin().GetMemoryBreakdown(&context, {}, &response).ok());
    uint64_t free = 0;
    for (const auto& pool : response.pools()) free += pool.free_frames();
    return free;
  }
  size_t NumSequences() {
    size_t number = 0;
    const Tenant tenant = role->worker().TenantNamed("default");
    for (ModelHost* host : role->worker().Hosts()) number += host->List(tenant, 0, 1000).size();
    return number;
  }
};

class ShardGroupTest : public ::testing::Test {
 protected:
  void StartRanks(uint32_t num_ranks, bool is_replicated = false, bool write_through = false) {
    for (uint32_t rank = 0; rank < num_ranks; ++rank) {
      RankUnderTest& started = *ranks_.emplace_back(std::make_unique<RankUnderTest>());
      started.model = RankModel(rank, num_ranks, is_replicated);
      ASSERT_TRUE(RegisterTestModel(*started.model, &store_).ok());
      Start(rank, write_through);
      started.address = started.role->address();
    }
    groups_ = v1::ShardGroupService::NewStub(ranks_[0]->client->channel());
  }
  void Start(uint32_t rank, bool write_through, const std::string& secret = "a secret of tests") {
    RankUnderTest& started = *ranks_[rank];
    started.store = std::make_unique<CountingStore>(&store_);
    WorkerRole::Options options;
    options.worker.id = absl::StrCat("rank-", rank);
    // Room for another rank's model.
    options.worker.model_pool_bytes =
        kFrames * started.model->geometry().bytes_per_page_of_tokens();
    options.worker.pool_bytes = 2 * options.worker.model_pool_bytes;
    options.worker.deployment_secret = secret;
    options.worker.host.write_through = write_through;
    auto role = WorkerRole::Start(options, started.store.get(), Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    started.role = *std::move(role);
    started.client = std::make_unique<WorkerClient>(started.role->address(), started.model);
  }
  void Kill(uint32_t rank) { ranks_[rank]->role.reset(); }

  template <typename Request>
  void SetMembers(Request* request) {
    for (const auto& rank : ranks_) {
      v1::ShardMember& member = *request->add_members();
      member.set_address(rank->address);
      member.set_model_digest(rank->model->digest().ToHex());
    }
  }
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (v1::ShardGroupService::Stub::*method)(
                                    grpc::ClientContext*, const Request&, Response*),
                                const Request& request,
                                absl::Duration timeout = absl::Seconds(60)) {
    TestContext context(timeout);
    Response response;
    const absl::Status status =
        FromGrpcStatus((groups_.get()->*method)(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
  v1::OpenShardGroupRequest OpenRequest(const std::vector<uint32_t>& tokens) {
    v1::OpenShardGroupRequest request;
    SetMembers(&request);
    request.mutable_tokens()->Add(tokens.begin(), tokens.end());
    return request;
  }
  absl::StatusOr<v1::OpenShardGroupResponse> Open(const v1::OpenShardGroupRequest& request) {
    return Call(&v1::ShardGroupService::Stub::OpenShardGroup, request);
  }
  absl::StatusOr<v1::OpenShardGroupResponse> Open(const std::vector<uint32_t>& tokens) {
    return Open(OpenRequest(tokens));
  }
  absl::StatusOr<v1::CommitShardGroupResponse> Commit(const v1::ShardGroup& group,
                                                      uint64_t length) {
    v1::CommitShardGroupRequest request;
    request.set_sequence_id(group.sequence_id());
    request.set_epoch(group.epoch());
    request.set_length(length);
    return Call(&v1::ShardGroupService::Stub::CommitShardGroup, request);
  }
  absl::StatusOr<v1::RewindShardGroupResponse> Rewind(const v1::ShardGroup& group,
                                                      uint64_t length) {
    v1::RewindShardGroupRequest request;
    request.set_sequence_id(group.sequence_id());
    request.set_epoch(group.epoch());
    request.set_length(length);
    return Call(&v1::ShardGroupService::Stub::RewindShardGroup, request);
  }
  absl::StatusOr<v1::CloseShardGroupResponse> Close(const v1::ShardGroup& group) {
    v1::CloseShardGroupRequest request;
    request.set_sequence_id(group.sequence_id());
    request.set_epoch(group.epoch());
    return Call(&v1::ShardGroupService::Stub::CloseShardGroup, request);
  }
  absl::StatusOr<v1::ShardGroup> Get(const v1::ShardGroup& group) {
    v1::GetShardGroupRequest request;
    request.set_sequence_id(group.sequence_id());
    const auto response = Call(&v1::ShardGroupService::Stub::GetShardGroup, request);
    if (!response.ok()) return response.status();
    return response->group();
  }
  uint64_t LengthOf(const v1::ShardGroup& group) {
    const auto now = Get(group);
    EXPECT_TRUE(now.ok()) << now.status();
    return now.ok() ? now->length() : ~uint64_t{0};
  }
  // Appends tokens[length of the rank, end) at one rank.
  absl::Status Append(const v1::ShardGroup& group, uint32_t rank,
                      const std::vector<uint32_t>& tokens, size_t end) {
    const auto state = ranks_[rank]->client->Get(group.ranks(rank).state().sequence_id());
    if (!state.ok()) return state.status();
    return ranks_[rank]->client->Append(*state, tokens, end).status();
  }
  void AppendAll(const v1::ShardGroup& group, const std::vector<uint32_t>& tokens, size_t end) {
    for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
      const auto state = ranks_[rank]->client->Get(group.ranks(rank).state().sequence_id());
      ASSERT_TRUE(state.ok()) << state.status();
      if (state->length() == end) continue;
      const absl::Status appended = Append(group, rank, tokens, end);
      ASSERT_TRUE(appended.ok()) << appended;
    }
  }
  // Puts a prompt into the cache of one rank; closes what it opened.
  void Know(uint32_t rank, const std::vector<uint32_t>& tokens, bool is_closed = true) {
    WorkerClient& client = *ranks_[rank]->client;
    const auto opened = client.Open(tokens);
    ASSERT_TRUE(opened.ok()) << opened.status();
    const auto appended = client.Append(opened->state(), tokens, tokens.size());
    ASSERT_TRUE(appended.ok()) << appended.status();
    if (!is_closed) return;
    ASSERT_TRUE(client.Close(appended->state()).ok());
  }
  void ExpectNothingIsOpen() {
    for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
      if (ranks_[rank]->role == nullptr) continue;
      EXPECT_EQ(ranks_[rank]->NumSequences(), 0u) << rank;
    }
  }
  double Stat(const std::string& name) { return ranks_[0]->client->Stat(name).value_or(-1); }

  MemoryPageStore store_;
  std::vector<std::unique_ptr<RankUnderTest>> ranks_;
  std::unique_ptr<v1::ShardGroupService::Stub> groups_;
  const std::vector<uint32_t> tokens_ = TestTokens(1, 200);
};

}  // namespace pagetide::shard_group_test

#endif  // PAGETIDE_TESTS_SERVICES_SHARD_GROUP_FIXTURE_H_
