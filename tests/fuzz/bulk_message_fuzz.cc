// Messages with one large field (rpc/byte_buffer.h): the reader in place accepts what protobuf
// accepts, and gives the same fields and payload, however the network cut the bytes.
// Input: one byte of slice length, then a PutPagesRequest.
#include <grpcpp/support/slice.h>

#include <string>
#include <vector>

#include "kvstore/page_store_codec.h"
#include "pagetide/v1/page_store.pb.h"
#include "rpc/byte_buffer.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const size_t step = 1 + in.Take<uint8_t>();
  const absl::string_view bytes = in.rest();
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size(); at += step) {
    const absl::string_view part = bytes.substr(at, step);
    slices.emplace_back(part.data(), part.size());
  }
  const grpc::ByteBuffer buffer(slices.data(), slices.size());
  v1::PutPagesRequest header;
  PayloadView payload;
  const absl::Status status = DecodeWithPayload(buffer, kPageBodyField, &header, &payload);
  v1::PutPagesRequest reference;
  const bool parses = reference.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()));
  if (!status.ok()) {
    FUZZ_CHECK(absl::IsInvalidArgument(status));
    return 0;
  }
  FUZZ_CHECK(parses);
  FUZZ_CHECK(payload.ToString() == reference.body());
  // The rest of the message: encoded again with the payload, it is the reference.
  const grpc::ByteBuffer again =
      EncodeWithPayload(header, kPageBodyField, std::as_bytes(std::span(reference.body())));
  v1::PutPagesRequest round;
  PayloadView round_payload;
  FUZZ_CHECK(DecodeWithPayload(again, kPageBodyField, &round, &round_payload).ok());
  FUZZ_CHECK(round_payload.ToString() == reference.body());
  FUZZ_CHECK(round.SerializeAsString() == header.SerializeAsString());
  if (header.has_header()) (void)DecodePageHeader(header.header());
  return 0;
}
