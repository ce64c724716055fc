#include "tests/support/worker_client.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/channel.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"
#include "tests/support/timing.h"

namespace pagetide::testing {
namespace {

constexpr size_t kPartBytes = 256 << 10;

// splitmix64, for test patterns. Source: Steele, Lea, Flood 2014.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

Model MakeTestModel(const TestModelOptions& options) {
  ModelSpec spec;
  spec.name = options.name;
  spec.weights_digest = Sha256Of(absl::StrCat("weights of ", options.name));
  spec.tokenizer_digest = Sha256Of("tokenizer");
  spec.vocabulary_size = options.vocabulary_size;
  spec.batch_invariant = options.batch_invariant;
  spec.geometry.page_tokens = options.page_tokens;
  LayerGroupSpec group;
  group.k_type = group.v_type = DataType::kF32;
  group.kv_heads = options.kv_heads;
  group.k_dim = group.v_dim = options.dim;
  for (uint32_t layer = 0; layer < options.num_layers; ++layer) group.layers.push_back(layer);
  spec.geometry.groups.push_back(std::move(group));
  absl::StatusOr<Model> model = Model::Create(std::move(spec));
  if (!model.ok()) abort();  // a mistake in the test itself
  return *std::move(model);
}

absl::Status RegisterTestModel(const Model& model, PageStore* store) {
  return store
      ->CompareAndSetRecord("model", model.digest().ToHex(), 0, SerializeModelSpec(model.spec()),
                            Clock::Real()->MonotonicNow() + absl::Seconds(10))
      .status();
}

std::string TestRow(const GroupGeometry& group, uint32_t token, uint64_t position, uint32_t layer,
                    RowKind kind) {
  // Small finite floats, so that attention over them stays finite too.
  std::vector<float> row(group.row_bytes(kind) / sizeof(float));
  const uint64_t seed = Mix(token ^ Mix(position ^ Mix(layer * 2 + (kind == RowKind::kK ? 0 : 1))));
  for (size_t i = 0; i < row.size(); ++i) {
    row[i] = static_cast<float>(Mix(seed + i) >> 40) / static_cast<float>(1 << 24) - 0.5f;
  }
  return std::string(reinterpret_cast<const char*>(row.data()), row.size() * sizeof(float));
}

std::string TestRows(const GroupGeometry& group, const std::vector<uint32_t>& tokens,
                     uint64_t begin, uint64_t end, uint32_t layer, RowKind kind) {
  std::string rows;
  rows.reserve((end - begin) * group.row_bytes(kind));
  for (uint64_t i = begin; i < end; ++i) rows += TestRow(group, tokens[i], i, layer, kind);
  return rows;
}

std::string TestPageBytes(const GroupGeometry& group, const std::vector<uint32_t>& tokens,
                          uint64_t end) {
  uint64_t x = 0;
  for (uint64_t i = 0; i < end; ++i) x = Mix(x ^ tokens[i]);
  std::string page(group.page_bytes(), '\0');
  for (size_t i = 0; i < page.size(); ++i) {
    if (i % 8 == 0) x = Mix(x + i);
    page[i] = static_cast<char>(x >> (8 * (i % 8)));
  }
  return page;
}

std::vector<uint32_t> TestTokens(uint64_t seed, size_t count) {
  std::vector<uint32_t> tokens(count);
  for (size_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<uint32_t>(Mix(seed * 1000003 + i) >> 33);
  }
  return tokens;
}

absl::StatusOr<double> WorkerClient::Stat(const std::string& name) {
  TestContext context;
  v1::GetStatsResponse response;
  PT_RETURN_IF_ERROR(FromGrpcStatus(admin_->GetStats(&context, {}, &response)));
  double sum = 0;
  for (const auto& [key, value] : response.values()) {
    // name, or name{label="…"}
    if (key.compare(0, name.size(), name) != 0) continue;
    if (key.size() == name.size() || key[name.size()] == '{') sum += value;
  }
  return sum;
}

bool WorkerClient::EventuallyStat(const std::string& name, double least) {
  return Eventually([&] { return Stat(name).value_or(0) >= least; });
}

TestContext::TestContext(absl::Duration timeout) {
  set_deadline(absl::ToChronoTime(absl::Now() + timeout));
}

WorkerClient::WorkerClient(const std::string& address, std::shared_ptr<const Model> model)
    : model_(std::move(model)),
      channel_(MakeChannel(address)),
      sequences_(v1::SequenceService::NewStub(channel_)),
      prefixes_(v1::PrefixService::NewStub(channel_)),
      edits_(v1::SequenceEditService::NewStub(channel_)),
      admin_(v1::AdminService::NewStub(channel_)) {}

absl::StatusOr<v1::OpenSequenceResponse> WorkerClient::Open(const std::vector<uint32_t>& prompt,
                                                            const std::string& request_id) {
  TestContext context;
  v1::OpenSequenceRequest request;
  request.set_request_id(request_id);
  request.set_model_digest(model_->digest().ToHex());
  request.mutable_tokens()->Add(prompt.begin(), prompt.end());
  v1::OpenSequenceResponse response;
  PT_RETURN_IF_ERROR(FromGrpcStatus(sequences_->OpenSequence(&context, request, &response)));
  return response;
}

absl::StatusOr<uint64_t> WorkerClient::WaitReady(const std::string& sequence_id) {
  TestContext context;
  v1::WatchReadinessRequest request;
  request.set_sequence_id(sequence_id);
  auto reader = sequences_->WatchReadiness(&context, request);
  v1::WatchReadinessResponse response;
  while (reader->Read(&response)) {
  }
  PT_RETURN_IF_ERROR(FromGrpcStatus(reader->Finish()));
  if (!response.done()) return absl::InternalError("readiness ended without done");
  return response.length();
}

absl::StatusOr<v1::AppendTokensResponse> WorkerClient::Append(const v1::SequenceState& state,
                                                              const std::vector<uint32_t>& tokens,
                                                              size_t end,
                                                              const std::string& request_id) {
  TestContext context;
  v1::AppendTokensResponse response;
  auto writer = sequences_->AppendTokens(&context, &response);
  v1::AppendTokensRequest message;
  v1::AppendHeader* header = message.mutable_header();
  header->set_request_id(request_id);
  header->mutable_sequence()->set_sequence_id(state.sequence_id());
  header->mutable_sequence()->set_epoch(state.epoch());
  header->set_append_id(absl::StrCat("append-", state.length()));
  header->set_expected_length(state.length());
  header->mutable_tokens()->Add(tokens.begin() + static_cast<ptrdiff_t>(state.length()),
                                tokens.begin() + static_cast<ptrdiff_t>(end));
  bool open = writer->Write(message);
  const PageGeometry& geometry = model_->geometry();
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const GroupGeometry& group = geometry.group(g);
    if (!group.has_rows()) {
      const bool is_state = group.spec().kind == LayerGroupSpec::Kind::kRecurrent;
      const uint64_t page_tokens = group.page_tokens();
      uint64_t last = is_state ? end : state.length() / page_tokens * page_tokens;
      for (uint32_t p = 0; open && (p == 0 || last < end); ++p) {
        last = std::min<uint64_t>(end, last + page_tokens);
        const std::string page = TestPageBytes(group, tokens, last);
        for (size_t at = 0; open && at < page.size(); at += kPartBytes) {
          v1::RowPart* part = message.mutable_rows();
          part->Clear();
          part->set_group(g);
          part->set_kind(v1::ROW_KIND_PAGE);
          part->set_page(p);
          part->set_page_offset(static_cast<uint32_t>(at));
          part->set_data(page.substr(at, kPartBytes));
          open = writer->Write(message);
        }
      }
      continue;
    }
    message.mutable_rows()->Clear();
    for (uint32_t layer = 0; open && layer < group.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        if (group.row_bytes(kind) == 0) continue;  // a latent has no V
        const size_t rows_a_part = std::max<size_t>(1, kPartBytes / group.row_bytes(kind));
        for (size_t at = state.length(); open && at < end; at += rows_a_part) {
          const size_t stop = std::min(end, at + rows_a_part);
          v1::RowPart* part = message.mutable_rows();
          part->set_group(g);
          part->set_layer(layer);
          part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
          part->set_first_token(static_cast<uint32_t>(at - state.length()));
          part->set_num_tokens(static_cast<uint32_t>(stop - at));
          part->set_data(TestRows(group, tokens, at, stop, layer, kind));
          open = writer->Write(message);
        }
      }
    }
  }
  writer->WritesDone();
  PT_RETURN_IF_ERROR(FromGrpcStatus(writer->Finish()));
  return response;
}

absl::StatusOr<uint64_t> WorkerClient::Verify(const std::string& sequence_id,
                                              const std::vector<uint32_t>& tokens, uint64_t begin,
                                              uint64_t end) {
  uint64_t compared = 0;
  const PageGeometry& geometry = model_->geometry();
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const GroupGeometry& group = geometry.group(g);
    if (!group.has_rows()) {
      PT_ASSIGN_OR_RETURN(const uint64_t pages, VerifyPages(sequence_id, g, tokens, begin, end));
      compared += pages;
      continue;
    }
    TestContext context;
    v1::ReadRowsRequest request;
    request.set_sequence_id(sequence_id);
    request.set_group(g);
    request.set_begin(begin);
    request.set_end(end);
    auto reader = sequences_->ReadRows(&context, request);
    uint64_t expected = 0;
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      expected += (end - begin) * group.num_layers() * group.row_bytes(kind);
    }
    uint64_t got = 0;
    v1::ReadRowsResponse part;
    absl::Status wrong;
    while (reader->Read(&part)) {
      const RowKind kind = part.kind() == v1::ROW_KIND_K ? RowKind::kK : RowKind::kV;
      got += part.data().size();
      const uint64_t stop = part.first_token() + part.num_tokens();
      if (part.first_token() < begin || stop > end ||
          part.data() != TestRows(group, tokens, part.first_token(), stop, part.layer(), kind)) {
        wrong = absl::DataLossError(absl::StrCat("rows [", part.first_token(), ", ", stop,
                                                 ") of layer ", part.layer(), " of ", sequence_id,
                                                 " are not what was written"));
      }
    }
    PT_RETURN_IF_ERROR(FromGrpcStatus(reader->Finish()));
    PT_RETURN_IF_ERROR(wrong);
    if (got != expected) {
      return absl::DataLossError(absl::StrCat("read ", got, " bytes, expected ", expected));
    }
    compared += got;
  }
  return compared;
}

absl::StatusOr<uint64_t> WorkerClient::VerifyPages(const std::string& sequence_id, uint32_t g,
                                                   const std::vector<uint32_t>& tokens,
                                                   uint64_t begin, uint64_t end) {
  const GroupGeometry& group = model_->geometry().group(g);
  TestContext context;
  v1::ReadRowsRequest request;
  request.set_sequence_id(sequence_id);
  request.set_group(g);
  request.set_begin(begin);
  request.set_end(end);
  auto reader = sequences_->ReadRows(&context, request);
  uint64_t got = 0, last = 0;
  v1::ReadRowsResponse part;
  absl::Status wrong;
  while (reader->Read(&part)) {
    got += part.data().size();
    last = part.first_token() + part.num_tokens();
    if (part.kind() == v1::ROW_KIND_PAGE && last <= tokens.size() &&
        part.data() ==
            TestPageBytes(group, tokens, last).substr(part.page_offset(), part.data().size())) {
      continue;
    }
    wrong = absl::DataLossError(absl::StrCat("page with tokens [", part.first_token(), ", ", last,
                                             ") of group ", g, " of ", sequence_id,
                                             " is not what was written"));
  }
  PT_RETURN_IF_ERROR(FromGrpcStatus(reader->Finish()));
  PT_RETURN_IF_ERROR(wrong);
  const uint64_t page_tokens = group.page_tokens();
  const uint64_t num_pages = end == begin ? 0
                             : group.spec().kind == LayerGroupSpec::Kind::kRecurrent
                                 ? 1
                                 : (end - 1) / page_tokens + 1 - begin / page_tokens;
  if (got != num_pages * group.page_bytes() || (num_pages > 0 && last < end)) {
    return absl::DataLossError(absl::StrCat("read ", got, " bytes up to token ", last,
                                            ", expected ", num_pages, " pages up to ", end));
  }
  return got;
}

absl::StatusOr<v1::ForkSequenceResponse> WorkerClient::Fork(const v1::SequenceState& state,
                                                            uint64_t length) {
  TestContext context;
  v1::ForkSequenceRequest request;
  request.mutable_source()->set_sequence_id(state.sequence_id());
  request.mutable_source()->set_epoch(state.epoch());
  request.set_length(length);
  v1::ForkSequenceResponse response;
  PT_RETURN_IF_ERROR(FromGrpcStatus(sequences_->ForkSequence(&context, request, &response)));
  return response;
}

absl::StatusOr<v1::RewindResponse> WorkerClient::Rewind(const v1::SequenceState& state,
                                                        int64_t length) {
  TestContext context;
  v1::RewindRequest request;
  request.mutable_sequence()->set_sequence_id(state.sequence_id());
  request.mutable_sequence()->set_epoch(state.epoch());
  request.set_length(length);
  v1::RewindResponse response;
  PT_RETURN_IF_ERROR(FromGrpcStatus(edits_->Rewind(&context, request, &response)));
  return response;
}

absl::StatusOr<v1::SequenceState> WorkerClient::Get(const std::string& sequence_id) {
  TestContext context;
  v1::GetSequenceRequest request;
  request.set_sequence_id(sequence_id);
  v1::GetSequenceResponse response;
  PT_RETURN_IF_ERROR(FromGrpcStatus(sequences_->GetSequence(&context, request, &response)));
  return response.state();
}

absl::Status WorkerClient::Close(const v1::SequenceState& state) {
  TestContext context;
  v1::CloseSequenceRequest request;
  request.set_sequence_id(state.sequence_id());
  request.set_epoch(state.epoch());
  v1::CloseSequenceResponse response;
  return FromGrpcStatus(sequences_->CloseSequence(&context, request, &response));
}

}  // namespace pagetide::testing
