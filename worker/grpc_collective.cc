#include "worker/grpc_collective.h"

#include <grpcpp/client_context.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "worker/transfer_wire.h"

namespace pagetide {

absl::StatusOr<std::unique_ptr<GrpcCollective>> GrpcCollective::Create(Options options,
                                                                       GroupMailbox* mailbox,
                                                                       const Clock* clock) {
  if (options.group_id.empty() || options.group_id.size() > kMaxGroupIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("group_id has ", options.group_id.size(),
                                                   " bytes, must have 1 to ", kMaxGroupIdBytes));
  }
  if (options.addresses.empty() || options.addresses.size() > kMaxGroupSize ||
      options.rank >= options.addresses.size()) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", options.rank, " of a group of ",
                                                   options.addresses.size(),
                                                   ", which must have 1 to ", kMaxGroupSize));
  }
  return std::unique_ptr<GrpcCollective>(new GrpcCollective(std::move(options), mailbox, clock));
}

GrpcCollective::GrpcCollective(Options options, GroupMailbox* mailbox, const Clock* clock)
    : options_(std::move(options)),
      mailbox_(mailbox),
      clock_(clock),
      pairs_(options_.addresses.size()) {}

absl::Status GrpcCollective::CheckRank(absl::string_view field, uint32_t rank) const {
  if (rank < size()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", rank, " in a group of ", size()));
}

absl::Status GrpcCollective::CheckWhole() const {
  if (!is_broken_.load()) return absl::OkStatus();
  return WithReason(absl::FailedPreconditionError(absl::StrCat(
                        "group ", options_.group_id, ": an earlier call failed or it was aborted")),
                    "GROUP_BROKEN");
}

absl::Status GrpcCollective::Broken(absl::Status status) {
  if (!status.ok()) is_broken_ = true;
  return status;
}

absl::Status GrpcCollective::SendNow(uint32_t to, const CollectiveBuffer& buffer,
                                     MonotonicTime deadline) {
  Pair& pair = pairs_[to];
  if (pair.stub == nullptr) {
    PT_ASSIGN_OR_RETURN(const auto channel, MakeBulkChannel(options_.addresses[to]));
    pair.stub = v1::TransferService::NewStub(channel);
  }
  const DeliveryName name{options_.tenant.name, options_.group_id, rank(), to, ++pair.num_sent};
  grpc::ClientContext context;
  if (deadline != MonotonicTime::InfiniteFuture()) {
    context.set_deadline(std::chrono::system_clock::now() +
                         absl::ToChronoMicroseconds(deadline - clock_->MonotonicNow()));
  }
  {
    MutexLock lock(&mu_);
    PT_RETURN_IF_ERROR(CheckWhole());
    sending_ = &context;
  }
  v1::DeliverBytesResponse response;
  const auto writer = pair.stub->DeliverBytes(&context, &response);
  v1::DeliverBytesRequest part;
  v1::DeliverBytesRequest::Header* const header = part.mutable_header();
  header->set_group_id(name.group);
  header->set_from_rank(name.from);
  header->set_to_rank(name.to);
  header->set_number(name.number);
  header->set_num_bytes(buffer.num_bytes);
  header->set_proof(ProveDelivery(name, buffer.num_bytes, options_.tenant.salt).ToBytes());
  bool is_open = writer->Write(part);
  part.clear_header();
  ChecksumStream checksum;
  absl::Status read;
  for (uint64_t at = 0; is_open && at < buffer.num_bytes; at += kMaxTransferPartBytes) {
    std::string* const data = part.mutable_data();
    data->resize(std::min<uint64_t>(kMaxTransferPartBytes, buffer.num_bytes - at));
    const auto bytes = std::as_writable_bytes(std::span<char>(*data));
    read = buffer.Read(at, bytes);
    if (!read.ok()) break;
    checksum.Update(bytes);
    is_open = writer->Write(part);
  }
  if (is_open && read.ok()) {
    part.Clear();
    SetChecksum(checksum.Get(), part.mutable_checksum());
    writer->WriteLast(part, grpc::WriteOptions());
  }
  if (!read.ok()) context.TryCancel();
  const absl::Status sent = FromGrpcStatus(writer->Finish());
  MutexLock lock(&mu_);
  sending_ = nullptr;
  return read.ok() ? sent : read;
}

absl::Status GrpcCollective::ReceiveNow(uint32_t from, const CollectiveBuffer& buffer,
                                        MonotonicTime deadline) {
  const DeliveryName name{options_.tenant.name, options_.group_id, from, rank(),
                          ++pairs_[from].num_received};
  return mailbox_->Receive(name, buffer, &is_broken_, deadline);
}

absl::Status GrpcCollective::Send(uint32_t to, const CollectiveBuffer& buffer,
                                  MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckRank("to", to));
  if (to == rank()) return absl::InvalidArgumentError(absl::StrCat("to is the own rank, ", to));
  PT_RETURN_IF_ERROR(CheckWhole());
  return Broken(SendNow(to, buffer, deadline));
}

absl::Status GrpcCollective::Receive(uint32_t from, const CollectiveBuffer& buffer,
                                     MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckRank("from", from));
  if (from == rank()) {
    return absl::InvalidArgumentError(absl::StrCat("from is the own rank, ", from));
  }
  PT_RETURN_IF_ERROR(CheckWhole());
  return Broken(ReceiveNow(from, buffer, deadline));
}

absl::Status GrpcCollective::Broadcast(uint32_t root, const CollectiveBuffer& buffer,
                                       MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckRank("root", root));
  PT_RETURN_IF_ERROR(CheckWhole());
  // Member i, counted from the root on, has the bytes from i without its lowest bit, and gives them
  // to i plus each lower bit, the farthest first.
  const uint32_t place = (rank() + size() - root) % size();
  uint32_t bit = 1;
  while (bit < size() && (place & bit) == 0) bit <<= 1;
  if (place != 0) {
    PT_RETURN_IF_ERROR(Broken(ReceiveNow((place - bit + root) % size(), buffer, deadline)));
  }
  for (bit >>= 1; bit > 0; bit >>= 1) {
    if (place + bit >= size()) continue;
    PT_RETURN_IF_ERROR(Broken(SendNow((place + bit + root) % size(), buffer, deadline)));
  }
  return absl::OkStatus();
}

void GrpcCollective::Abort() {
  MutexLock lock(&mu_);
  is_broken_ = true;
  if (sending_ != nullptr) sending_->TryCancel();
}

}  // namespace pagetide
