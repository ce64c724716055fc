// Messages of an append stream: the reader in place and protobuf agree, whatever the bytes and
// however the network cut them.
// Input: one byte of slice length, then the message.
#include <grpcpp/support/slice.h>

#include <string>
#include <vector>

#include "tests/fuzz/fuzz_check.h"
#include "worker/row_wire.h"

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
  AppendMessage message;
  *message.buffer() = grpc::ByteBuffer(slices.data(), slices.size());
  const absl::Status status = message.Decode();
  v1::AppendTokensRequest reference;
  const bool parses = reference.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()));
  if (!status.ok()) {
    FUZZ_CHECK(absl::IsInvalidArgument(status));
    return 0;
  }
  FUZZ_CHECK(parses);
  FUZZ_CHECK(message.is_header() == reference.has_header());
  if (message.is_header()) return 0;
  const v1::RowPart& rows = reference.rows();
  FUZZ_CHECK(message.num_bytes() == rows.data().size());
  FUZZ_CHECK(message.run().group == rows.group() && message.run().layer == rows.layer() &&
             message.run().first_token == rows.first_token() &&
             message.run().num_tokens == rows.num_tokens());
  std::string copied(message.num_bytes(), '\0');
  for (size_t at = 0; at < copied.size(); at += 5) {
    const size_t n = std::min<size_t>(5, copied.size() - at);
    message.CopyNext({reinterpret_cast<std::byte*>(copied.data()) + at, n});
  }
  FUZZ_CHECK(copied == rows.data());
  return 0;
}
