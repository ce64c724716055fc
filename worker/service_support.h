// What the worker's gRPC services share: who calls and until when, and the conversions between
// messages and the domain. Pure functions; thread-safe.
#ifndef PAGETIDE_WORKER_SERVICE_SUPPORT_H_
#define PAGETIDE_WORKER_SERVICE_SUPPORT_H_

#include <google/protobuf/duration.pb.h>
#include <google/protobuf/message_lite.h>
#include <google/protobuf/repeated_field.h>
#include <google/protobuf/timestamp.pb.h>
#include <grpcpp/server_context.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/digest.h"
#include "pagetide/v1/prefix.pb.h"
#include "pagetide/v1/types.pb.h"
#include "rpc/duration_proto.h"
#include "worker/model_host.h"
#include "worker/worker.h"

namespace pagetide {

// Calls without a deadline get the first; none gets more than the second. Streams are ended then
// (rpc/stream_deadlines.h).
inline constexpr absl::Duration kDefaultCallTime = absl::Seconds(30);
inline constexpr absl::Duration kMaxCallTime = absl::Minutes(10);
// Kept of a caller's deadline for the answer to reach it (a tenth of short deadlines).
inline constexpr absl::Duration kAnswerTime = absl::Milliseconds(50);

struct CallContext {
  Tenant tenant;
  MonotonicTime deadline;  // for the work: a moment before `end`, which is for the answer
  MonotonicTime end;
};
CallContext MakeCallContext(const grpc::ServerContextBase& context, const Worker& worker);

// INVALID_ARGUMENT names the field.
absl::StatusOr<SequenceId> SequenceIdFromProto(absl::string_view sequence_id);

// The host and the id of a sequence named by a request. INVALID_ARGUMENT, NOT_FOUND.
struct SequenceTarget {
  ModelHost* host = nullptr;
  SequenceId id;
};
absl::StatusOr<SequenceTarget> FindSequence(const Worker& worker, absl::string_view sequence_id);

struct HandleTarget {
  ModelHost* host = nullptr;
  SequenceHandle handle;
};
absl::StatusOr<HandleTarget> FindSequence(const Worker& worker, const v1::SequenceRef& ref);

inline std::span<const uint32_t> TokensOf(const google::protobuf::RepeatedField<uint32_t>& tokens) {
  return {tokens.data(), static_cast<size_t>(tokens.size())};
}
absl::StatusOr<std::vector<PositionedInput>> InputsFromProto(
    const google::protobuf::RepeatedPtrField<v1::InputDigest>& inputs);
// INVALID_ARGUMENT names `field` unless the duration is valid and not negative.
absl::StatusOr<absl::Duration> DurationFromProto(absl::string_view field,
                                                 const google::protobuf::Duration& duration);
google::protobuf::Timestamp TimestampToProto(absl::Time time);
absl::StatusOr<RowKind> RowKindFromProto(absl::string_view field, int kind);

// Entries of one page of a list, unless its request says otherwise.
inline constexpr uint32_t kDefaultListSize = 100;
inline constexpr uint32_t kMaxListSize = 1000;
// How many entries to list; 0 wants the default. INVALID_ARGUMENT (page_size) above `most`.
absl::StatusOr<uint32_t> ListSize(uint32_t page_size, uint32_t otherwise, uint32_t most);
// Tokens of answers that come in pages: numbers, which mean something to the call that made them.
// INVALID_ARGUMENT (page_token) unless it is one of N numbers.
std::string MakePageToken(std::initializer_list<uint64_t> numbers);
absl::Status ParsePageToken(absl::string_view token, std::span<uint64_t> numbers);
template <size_t N>
absl::StatusOr<std::array<uint64_t, N>> ParsePageToken(absl::string_view token) {
  std::array<uint64_t, N> numbers{};
  const absl::Status parsed = ParsePageToken(token, numbers);
  if (!parsed.ok()) return parsed;
  return numbers;
}
// INVALID_ARGUMENT (name_prefix) unless a name may begin so.
absl::Status ValidateNamePrefix(absl::string_view prefix);

v1::SequenceState StateToProto(const Worker& worker, const ModelHost& host,
                               const SequenceInfo& info);
v1::PrefixReuse ReuseToProto(const PrefixReuse& reuse);

// SHA-256 of the message's serialized bytes: what "the same request again" means.
Digest DigestOfMessage(const google::protobuf::MessageLite& message);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SERVICE_SUPPORT_H_
