// AppendTokensRequest read from a raw byte buffer, without a copy of its rows into a protobuf
// string. The rows are one level down, in the RowPart, where rpc/byte_buffer.h does not reach. What
// is read is plain protobuf: messages laid out in an unusual way are read too, with a copy.
#ifndef PAGETIDE_WORKER_ROW_WIRE_H_
#define PAGETIDE_WORKER_ROW_WIRE_H_

#include <google/protobuf/io/coded_stream.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pagetide/v1/sequence.pb.h"
#include "worker/model_host.h"

namespace pagetide {

// Bytes of rows in one message.
inline constexpr uint64_t kMaxPartBytes = uint64_t{1} << 20;

// What a part says of itself, without its bytes. INVALID_ARGUMENT names `field`.
absl::StatusOr<RowRun> RunFromProto(absl::string_view field, const v1::RowPart& part);

// One message of an append stream. Holds the buffer that its rows lie in; not thread-safe.
class AppendMessage {
 public:
  AppendMessage() = default;
  AppendMessage(const AppendMessage&) = delete;
  AppendMessage& operator=(const AppendMessage&) = delete;

  grpc::ByteBuffer* buffer() { return &buffer_; }
  // Reads what buffer() holds. INVALID_ARGUMENT when it is not an AppendTokensRequest, has no part,
  // or more than kMaxPartBytes of rows.
  absl::Status Decode();

  bool is_header() const { return message_.has_header(); }
  const v1::AppendHeader& header() const { return message_.header(); }
  // Of a rows message.
  const RowRun& run() const { return run_; }
  uint64_t num_bytes() const { return num_bytes_; }
  // The next dst.size() row bytes, in order. At most num_bytes() in all.
  void CopyNext(std::span<std::byte> dst);

 private:
  // True when the message is laid out as every known writer does it: rows only, data last.
  bool DecodeFast(v1::RowPart* part);
  absl::Status DecodeSlow();
  absl::Status SetRun(const v1::RowPart& part);

  grpc::ByteBuffer buffer_;
  std::unique_ptr<grpc::ProtoBufferReader> reader_;
  std::unique_ptr<google::protobuf::io::CodedInputStream> rest_;  // stands at the row bytes
  v1::AppendTokensRequest message_;  // the header, or all of it after DecodeSlow
  RowRun run_;
  uint64_t num_bytes_ = 0;
  uint64_t copied_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ROW_WIRE_H_
