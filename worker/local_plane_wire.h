// The first and only message of a local client, taken from the bytes its socket gave. Stateless.
#ifndef PAGETIDE_WORKER_LOCAL_PLANE_WIRE_H_
#define PAGETIDE_WORKER_LOCAL_PLANE_WIRE_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pagetide/v1/local_plane.pb.h"

namespace pagetide {

inline constexpr size_t kLocalLengthBytes = 4;  // u32 LE in front of a message
inline constexpr uint32_t kMaxLocalHelloBytes = 4096;

// The hello in `received`; nullopt while it has not arrived whole. INVALID_ARGUMENT when it can no
// longer become one: too long, followed by more bytes, or no message.
absl::StatusOr<std::optional<v1::LocalHello>> ParseLocalHello(absl::string_view received);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_LOCAL_PLANE_WIRE_H_
