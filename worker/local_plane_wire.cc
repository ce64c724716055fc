#include "worker/local_plane_wire.h"

#include "absl/strings/str_cat.h"

namespace pagetide {

absl::StatusOr<std::optional<v1::LocalHello>> ParseLocalHello(absl::string_view received) {
  if (received.size() < kLocalLengthBytes) return std::nullopt;
  uint32_t length = 0;
  for (size_t i = 0; i < kLocalLengthBytes; ++i) {
    length |= uint32_t{static_cast<uint8_t>(received[i])} << (8 * i);
  }
  const absl::string_view message = received.substr(kLocalLengthBytes);
  if (length > kMaxLocalHelloBytes || message.size() > length) {
    return absl::InvalidArgumentError(absl::StrCat("a hello of ", length, " bytes (at most ",
                                                   kMaxLocalHelloBytes, ") came with ",
                                                   message.size()));
  }
  if (message.size() < length) return std::nullopt;
  v1::LocalHello hello;
  if (!hello.ParseFromArray(message.data(), static_cast<int>(message.size()))) {
    return absl::InvalidArgumentError(absl::StrCat(message.size(), " bytes are not a LocalHello"));
  }
  return hello;
}

}  // namespace pagetide
