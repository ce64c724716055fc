#include "worker/service_support.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "services/tenant.h"

namespace pagetide {

CallContext MakeCallContext(const grpc::ServerContextBase& context, const Worker& worker) {
  const std::chrono::system_clock::time_point end = context.deadline();
  absl::Duration left = kDefaultCallTime;
  if (end != std::chrono::system_clock::time_point::max()) {
    left = absl::FromChrono(end - std::chrono::system_clock::now());
    // gRPC states "no deadline" as a date centuries away.
    if (left > absl::Hours(24 * 365)) left = kDefaultCallTime;
  }
  left = std::clamp(left, absl::ZeroDuration(), kMaxCallTime);
  // The last moment is for the answer: "needed, free, evictable" says more than a deadline that
  // passed at the caller.
  const MonotonicTime now = worker.clock().MonotonicNow();
  return CallContext{worker.TenantNamed(TenantOf(context)),
                     now + left - std::min(left / 10, kAnswerTime), now + left};
}

absl::StatusOr<SequenceId> SequenceIdFromProto(absl::string_view sequence_id) {
  absl::StatusOr<SequenceId> id = SequenceId::Parse(sequence_id);
  if (id.ok()) return id;
  return absl::InvalidArgumentError(absl::StrCat("sequence_id: ", id.status().message()));
}

absl::StatusOr<SequenceTarget> FindSequence(const Worker& worker, absl::string_view sequence_id) {
  PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceIdFromProto(sequence_id));
  PT_ASSIGN_OR_RETURN(ModelHost * host, worker.HostOfSequence(id));
  return SequenceTarget{host, id};
}

absl::StatusOr<HandleTarget> FindSequence(const Worker& worker, const v1::SequenceRef& ref) {
  PT_ASSIGN_OR_RETURN(const SequenceTarget target, FindSequence(worker, ref.sequence_id()));
  HandleTarget result{target.host, SequenceHandle{.id = target.id, .epoch = ref.epoch()}};
  if (ref.has_expected_revision()) result.handle.expected_revision = ref.expected_revision();
  return result;
}

absl::StatusOr<std::vector<PositionedInput>> InputsFromProto(
    const google::protobuf::RepeatedPtrField<v1::InputDigest>& inputs) {
  std::vector<PositionedInput> result;
  result.reserve(inputs.size());
  for (int i = 0; i < inputs.size(); ++i) {
    absl::StatusOr<Digest> digest = Digest::FromBytes(inputs[i].digest());
    if (!digest.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "inputs[", i, "].digest has ", inputs[i].digest().size(), " bytes, must have 32"));
    }
    if (i > 0 && inputs[i].position() < inputs[i - 1].position()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "inputs[", i, "].position ", inputs[i].position(), " is below the one before, ",
          inputs[i - 1].position(), ": inputs must ascend"));
    }
    result.push_back({inputs[i].position(), *digest});
  }
  return result;
}

absl::StatusOr<absl::Duration> DurationFromProto(absl::string_view field,
                                                 const google::protobuf::Duration& duration) {
  // The range of google.protobuf.Duration: about 10,000 years.
  constexpr int64_t kMaxSeconds = 315576000000;
  if (duration.seconds() < 0 || duration.seconds() > kMaxSeconds || duration.nanos() < 0 ||
      duration.nanos() >= 1000000000) {
    return absl::InvalidArgumentError(absl::StrCat(field, " is {seconds ", duration.seconds(),
                                                   ", nanos ", duration.nanos(),
                                                   "}, must be a duration of at least 0"));
  }
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

google::protobuf::Timestamp TimestampToProto(absl::Time time) {
  const int64_t nanos = absl::ToUnixNanos(time);
  google::protobuf::Timestamp proto;
  proto.set_seconds(nanos / 1000000000);
  proto.set_nanos(static_cast<int32_t>(nanos % 1000000000));
  return proto;
}

absl::StatusOr<RowKind> RowKindFromProto(absl::string_view field, int kind) {
  switch (kind) {
    case v1::ROW_KIND_K:
      return RowKind::kK;
    case v1::ROW_KIND_PAGE:
      return RowKind::kPage;
    case v1::ROW_KIND_V:
      return RowKind::kV;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat(field, " is ", kind, ", must be ROW_KIND_K or ROW_KIND_V"));
  }
}

absl::StatusOr<uint32_t> ListSize(uint32_t page_size, uint32_t otherwise, uint32_t most) {
  if (page_size > most) {
    return absl::InvalidArgumentError(absl::StrCat("page_size is ", page_size, ", at most ", most));
  }
  return page_size == 0 ? otherwise : page_size;
}

std::string MakePageToken(std::initializer_list<uint64_t> numbers) {
  return absl::StrJoin(numbers, ".");
}

absl::Status ParsePageToken(absl::string_view token, std::span<uint64_t> numbers) {
  size_t n = 0;
  for (absl::string_view part : absl::StrSplit(token, '.')) {
    if (n == numbers.size() || !absl::SimpleAtoi(part, &numbers[n])) {
      n = 0;
      break;
    }
    ++n;
  }
  if (n == numbers.size()) return absl::OkStatus();
  return absl::InvalidArgumentError("page_token is not one that this call has returned");
}

absl::Status ValidateNamePrefix(absl::string_view prefix) {
  const bool is_ok =
      prefix.size() <= 128 && std::all_of(prefix.begin(), prefix.end(), [](char c) {
        return absl::ascii_isdigit(c) || absl::ascii_islower(c) || c == '.' || c == '_' || c == '-';
      });
  if (is_ok) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("name_prefix has ", prefix.size(),
                   " characters and is not at most 128 of a-z, 0-9, '.', '_', '-'"));
}

v1::SequenceState StateToProto(const Worker& worker, const ModelHost& host,
                               const SequenceInfo& info) {
  v1::SequenceState state;
  state.set_sequence_id(info.id.ToString());
  state.set_epoch(info.epoch);
  state.set_revision(info.revision);
  state.set_length(info.length);
  state.set_canonical_length(info.canonical_length);
  state.set_model_digest(host.model().digest().ToHex());
  state.set_worker_id(worker.id());
  state.set_pending_tokens(info.pending_tokens);
  state.set_num_pages(info.num_pages);
  state.set_resident_pages(info.resident_pages);
  state.set_shared_pages(info.shared_pages);
  state.set_end_position(static_cast<uint64_t>(info.end_position));
  return state;
}

v1::PrefixReuse ReuseToProto(const PrefixReuse& reuse) {
  static_assert(static_cast<int>(ReuseLimit::kWholePrompt) == v1::REUSE_LIMIT_WHOLE_PROMPT);
  static_assert(static_cast<int>(ReuseLimit::kNoFrame) == v1::REUSE_LIMIT_NO_FRAME);
  v1::PrefixReuse proto;
  proto.set_prompt_tokens(reuse.prompt_tokens);
  proto.set_reused_tokens(reuse.reused_tokens);
  proto.set_shared_pages(reuse.shared_pages);
  proto.set_partial_rows(reuse.partial_rows);
  proto.set_device_tokens(reuse.device_tokens);
  proto.set_host_tokens(reuse.host_tokens);
  proto.set_store_tokens(reuse.store_tokens);
  proto.set_limit(static_cast<v1::ReuseLimit>(reuse.limit));
  proto.set_limiting_group(reuse.limiting_group);
  proto.set_explanation(reuse.explanation);
  proto.set_chunk_tokens(reuse.chunk_tokens);
  return proto;
}

Digest DigestOfMessage(const google::protobuf::MessageLite& message) {
  std::string bytes;
  google::protobuf::io::StringOutputStream stream(&bytes);
  google::protobuf::io::CodedOutputStream out(&stream);
  out.SetSerializationDeterministic(true);
  message.SerializeToCodedStream(&out);
  out.Trim();
  return Sha256Of(bytes);
}

}  // namespace pagetide
