// Durations as requests and answers carry them.
#ifndef PAGETIDE_RPC_DURATION_PROTO_H_
#define PAGETIDE_RPC_DURATION_PROTO_H_

#include <google/protobuf/duration.pb.h>

#include <cstdint>

#include "absl/time/time.h"

namespace pagetide {

// Whole seconds and the nanoseconds that are left, of one sign.
inline google::protobuf::Duration DurationToProto(absl::Duration duration) {
  google::protobuf::Duration proto;
  proto.set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
  return proto;
}

}  // namespace pagetide

#endif  // PAGETIDE_RPC_DURATION_PROTO_H_
