// Helpers of the router's tests: a small model, prompts, a worker that speaks the Attach stream by
// hand, and calls with deadlines.
#ifndef PAGETIDE_TESTS_SERVICES_ROUTER_FIXTURE_H_
#define PAGETIDE_TESTS_SERVICES_ROUTER_FIXTURE_H_

#include <grpcpp/client_context.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "core/keys.h"
#include "core/residency_digest.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "pagetide/v1/worker_registry.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"
#include "services/tenant.h"
#include "tests/support/timing.h"

namespace pagetide::testing {

inline constexpr uint32_t kTestPageTokens = 16;

inline v1::ModelSpec TestModelSpec(const std::string& name = "tiny", char weights = 'w') {
  v1::ModelSpec spec;
  spec.set_name(name);
  spec.set_weights_digest(std::string(32, weights));
  spec.set_tokenizer_digest(std::string(32, 't'));
  spec.set_vocabulary_size(1000);
  spec.mutable_geometry()->set_page_tokens(kTestPageTokens);
  v1::LayerGroup& group = *spec.mutable_geometry()->add_groups();
  group.set_kind(v1::LayerGroup::KIND_FULL);
  group.add_layers(0);
  group.set_k_type(v1::DATA_TYPE_F32);
  group.set_v_type(v1::DATA_TYPE_F32);
  group.set_kv_heads(1);
  group.set_k_dim(8);
  group.set_v_dim(8);
  return spec;
}

// The same as the shard of a rank: a KV head of num_ranks.
inline v1::ModelSpec TestShardSpec(uint32_t rank, uint32_t num_ranks) {
  v1::ModelSpec spec = TestModelSpec(absl::StrCat("shard-", rank, "-of-", num_ranks));
  v1::Shard& shard = *spec.mutable_geometry()->mutable_shard();
  shard.set_kv_head_begin(rank);
  shard.set_kv_head_end(rank + 1);
  shard.set_rank(rank);
  shard.set_num_ranks(num_ranks);
  return spec;
}

inline std::vector<uint32_t> TestTokens(uint32_t n, uint32_t seed = 0) {
  std::vector<uint32_t> tokens(n);
  for (uint32_t i = 0; i < n; ++i) tokens[i] = (i * 7 + seed) % 1000;
  return tokens;
}

inline v1::Prompt TestPrompt(const std::string& model, const std::vector<uint32_t>& tokens) {
  v1::Prompt prompt;
  prompt.set_model(model);
  prompt.mutable_tokens()->Add(tokens.begin(), tokens.end());
  return prompt;
}

// Prefix keys of the default tenant under the development secret.
inline std::vector<PrefixKey> TestKeys(const Model& model, const std::vector<uint32_t>& tokens) {
  const TenantSalts salts{std::string(kDevelopmentSecret)};
  const uint32_t page_tokens = model.geometry().page_tokens();
  return PrefixKeysOf(RootPrefixKey(salts.SaltOf("default"), model.identity(), page_tokens), tokens,
                      page_tokens);
}

inline v1::AttachHello TestHello(const std::string& id, uint64_t incarnation) {
  v1::AttachHello hello;
  hello.set_worker_id(id);
  hello.set_incarnation(incarnation);
  hello.set_address("127.0.0.1:1");
  hello.set_role("worker");
  return hello;
}

inline v1::LoadReport TestLoad(const std::string& model_digest) {
  v1::LoadReport load;
  load.set_total_frames(1000);
  load.set_prefill_tokens_per_second(1000);
  load.set_store_bytes_per_second(1e9);
  load.add_model_digests(model_digest);
  return load;
}

// A worker's side of Attach, message by message. Every read has a deadline: that of the stream.
class HandWorker {
 public:
  explicit HandWorker(const std::string& router_address)
      : stub_(v1::WorkerRegistryService::NewStub(MakeChannel(router_address))) {
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(120));
    stream_ = stub_->Attach(&context_);
  }
  ~HandWorker() {
    context_.TryCancel();
    if (!is_finished_) stream_->Finish();
  }

  bool Hello(const v1::AttachHello& hello) {
    v1::AttachRequest request;
    *request.mutable_hello() = hello;
    return stream_->Write(request);
  }
  bool Load(const v1::LoadReport& load) {
    v1::AttachRequest request;
    *request.mutable_load() = load;
    return stream_->Write(request);
  }
  // Keys that are held now; `number` as given.
  v1::ResidencyReport Report(uint64_t number, const std::vector<PrefixKey>& keys) {
    v1::ResidencyReport report;
    report.set_number(number);
    for (const PrefixKey& key : keys) {
      v1::ResidencyReport::Change& change = *report.add_changes();
      change.set_prefix_hint(std::string(PrefixHint::Of(key).view()));
      change.set_tier(v1::TIER_DEVICE);
    }
    return report;
  }
  bool Residency(const v1::ResidencyReport& report) {
    v1::AttachRequest request;
    *request.mutable_residency() = report;
    return stream_->Write(request);
  }
  bool Sequences(const v1::SequenceReport& report) {
    v1::AttachRequest request;
    *request.mutable_sequences() = report;
    return stream_->Write(request);
  }
  bool Read(v1::AttachResponse* response) { return stream_->Read(response); }
  grpc::Status Finish() {
    is_finished_ = true;
    return stream_->Finish();
  }
  // Reads until the stream ends, and returns its status.
  grpc::Status ReadToEnd() {
    v1::AttachResponse response;
    while (Read(&response)) {
    }
    return Finish();
  }

 private:
  const std::unique_ptr<v1::WorkerRegistryService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::AttachRequest, v1::AttachResponse>> stream_;
  bool is_finished_ = false;
};

// One call with a deadline.
template <typename Stub, typename Method, typename Request, typename Response>
absl::Status CallWithDeadline(Stub* stub, Method method, const Request& request,
                              Response* response) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  response->Clear();
  return FromGrpcStatus((stub->*method)(&context, request, response));
}

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_SERVICES_ROUTER_FIXTURE_H_
