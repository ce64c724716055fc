// The bulk path: protobuf messages with one large `bytes` field, encoded to and decoded from gRPC's
// slices without copying that field. What is sent is plain protobuf, readable by any client: the
// other fields in their usual form, then the tag and length of the payload field, then the
// payload's slices (parsers take fields in any order). Use it in handlers registered with
// WithRawCallbackMethod_X and in clients that call through a raw stub. All functions are
// thread-safe on different objects.
#ifndef PAGETIDE_RPC_BYTE_BUFFER_H_
#define PAGETIDE_RPC_BYTE_BUFFER_H_

#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pagetide {

// A slice over memory that `owner` keeps valid and unchanged: a pin, a lease, a shared_ptr. The
// owner is moved along and destroyed, on whatever thread that happens, once gRPC has sent the last
// byte.
template <typename Owner>
grpc::Slice LendSlice(std::span<const std::byte> bytes, Owner owner) {
  auto* const held = new Owner(std::move(owner));
  return grpc::Slice(
      const_cast<std::byte*>(bytes.data()), bytes.size(),
      [](void* p) { delete static_cast<Owner*>(p); }, held);
}

// `header` without the payload field, then `payload` as the value of `field`. The payload's bytes
// are referenced, not copied. Several slices are one value. The caller keeps the message below
// kMaxMessageBytes (rpc/channel.h); gRPC refuses to send more.
grpc::ByteBuffer EncodeWithPayload(const google::protobuf::MessageLite& header, int field,
                                   std::span<const grpc::Slice> payload);
grpc::ByteBuffer EncodeWithPayload(const google::protobuf::MessageLite& header, int field,
                                   grpc::Slice payload);
// Copies `payload` once.
grpc::ByteBuffer EncodeWithPayload(const google::protobuf::MessageLite& header, int field,
                                   std::span<const std::byte> payload);
// A message whose only field `outer_field` is a message: `inner` without its payload field, then
// `payload` as the value of `field` in it.
grpc::ByteBuffer EncodeNestedPayload(int outer_field, const google::protobuf::MessageLite& inner,
                                     int field, std::span<const grpc::Slice> payload);
// A message without a payload, for a raw call.
grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message);

// The bytes of a decoded payload field, as received: pieces in order. Holds references to the
// receive buffers, which hold up to kMaxMessageBytes each: copy out and let go.
class PayloadView {
 public:
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  size_t num_pieces() const { return slices_.size(); }
  std::span<const std::byte> piece(size_t i) const {
    return {reinterpret_cast<const std::byte*>(slices_[i].begin()), slices_[i].size()};
  }
  // INVALID_ARGUMENT, and nothing is written, unless `out` has exactly size() bytes.
  absl::Status CopyTo(std::span<std::byte> out) const;
  std::string ToString() const;

  void Clear();
  void Append(grpc::Slice slice);

 private:
  std::vector<grpc::Slice> slices_;
  size_t size_ = 0;
};

// Parses `buffer` as a message of header's type, except that the value of the `bytes` field `field`
// goes to `payload` (the last one if it occurs several times, as protobuf has it). Both outputs are
// replaced. INVALID_ARGUMENT for anything protobuf would not parse, for groups (proto2) and for
// tags in more bytes than they need to hold 32 bits; the outputs are then unspecified. Nothing is
// allocated on the strength of a length that the buffer does not back.
absl::Status DecodeWithPayload(const grpc::ByteBuffer& buffer, int field,
                               google::protobuf::MessageLite* header, PayloadView* payload);
// A message without a payload, from a raw call.
absl::Status DecodeMessage(const grpc::ByteBuffer& buffer, google::protobuf::MessageLite* message);

}  // namespace pagetide

#endif  // PAGETIDE_RPC_BYTE_BUFFER_H_
