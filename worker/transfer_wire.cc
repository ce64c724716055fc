#include "worker/transfer_wire.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/little_endian.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr size_t kChecksumBytes = 16;

}  // namespace

void SetChecksum(const Checksum128& checksum, std::string* bytes) {
  bytes->clear();
  AppendLittleEndian<uint64_t>(bytes, checksum.low);
  AppendLittleEndian<uint64_t>(bytes, checksum.high);
}

absl::StatusOr<Checksum128> ChecksumFromBytes(absl::string_view field, absl::string_view bytes) {
  if (bytes.size() != kChecksumBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, " has ", bytes.size(), " bytes, must have ", kChecksumBytes));
  }
  LittleEndianReader reader(bytes);
  Checksum128 checksum;
  checksum.low = reader.Take<uint64_t>();
  checksum.high = reader.Take<uint64_t>();
  return checksum;
}

v1::ReserveTransferRequest PlanToProto(const TransferPlan& plan, const Tenant& tenant) {
  static_assert(static_cast<int>(TransferKind::kCopy) == v1::TRANSFER_KIND_COPY);
  static_assert(static_cast<int>(TransferKind::kMove) == v1::TRANSFER_KIND_MOVE);
  static_assert(static_cast<int>(TransferKind::kPages) == v1::TRANSFER_KIND_PAGES);
  v1::ReserveTransferRequest proto;
  proto.set_model_digest(plan.state.model_digest.ToHex());
  proto.set_kind(static_cast<v1::TransferKind>(plan.kind));
  proto.set_state(EncodeSessionState(plan.state));
  for (const TransferPage& page : plan.pages) {
    v1::TransferPage* const to = proto.add_pages();
    to->set_key(page.ref.key.digest.ToBytes());
    SetChecksum(page.ref.checksum, to->mutable_checksum());
    to->set_rows(page.rows);
    to->set_is_full(page.is_full);
  }
  if (plan.kind == TransferKind::kMove) {
    proto.set_sequence_id(plan.identity.id.ToString());
    proto.set_epoch(plan.identity.epoch);
  }
  proto.set_proof(ProveTransfer(plan, proto.state(), tenant.salt).ToBytes());
  return proto;
}

absl::StatusOr<TransferPlan> PlanFromProto(const v1::ReserveTransferRequest& request,
                                           const Tenant& tenant) {
  TransferPlan plan;
  if (request.kind() < v1::TRANSFER_KIND_COPY || request.kind() > v1::TRANSFER_KIND_PAGES) {
    return absl::InvalidArgumentError(
        absl::StrCat("kind is ", static_cast<int>(request.kind()), ", known are 1 to 3"));
  }
  plan.kind = static_cast<TransferKind>(request.kind());
  plan.pages.reserve(request.pages_size());
  for (int i = 0; i < request.pages_size(); ++i) {
    const v1::TransferPage& from = request.pages(i);
    absl::StatusOr<Digest> key = Digest::FromBytes(from.key());
    if (!key.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("pages[", i, "].key has ", from.key().size(), " bytes, must have 32"));
    }
    PT_ASSIGN_OR_RETURN(
        const Checksum128 checksum,
        ChecksumFromBytes(absl::StrCat("pages[", i, "].checksum"), from.checksum()));
    TransferPage& page = plan.pages.emplace_back();
    page.ref.key.digest = *key;
    page.ref.checksum = checksum;
    page.rows = from.rows();
    page.is_full = from.is_full();
  }
  if (plan.kind == TransferKind::kMove) {
    absl::StatusOr<SequenceId> id = SequenceId::Parse(request.sequence_id());
    if (!id.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("sequence_id: ", id.status().message()));
    }
    plan.identity = {*id, request.epoch()};
  }
  // What nobody proved is not looked into.
  if (ProveTransfer(plan, request.state(), tenant.salt).view() != request.proof()) {
    return WithReason(absl::PermissionDeniedError(
                          "reserve transfer: the proof is not of a worker of this deployment, for "
                          "this tenant"),
                      "NOT_PROVEN");
  }
  PT_ASSIGN_OR_RETURN(plan.state, ParseSessionState(request.state(), plan.pages.size()));
  return plan;
}

}  // namespace pagetide
