// WithContext: a status that says whose it is, and keeps its reason and facts.
#ifndef PAGETIDE_BASE_STATUS_CONTEXT_H_
#define PAGETIDE_BASE_STATUS_CONTEXT_H_

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pagetide {

// "context: message", with the code and the payloads of `status`. OK stays OK.
inline absl::Status WithContext(absl::string_view context, const absl::Status& status) {
  if (status.ok()) return status;
  absl::Status result(status.code(), absl::StrCat(context, ": ", status.message()));
  status.ForEachPayload(
      [&](absl::string_view type, const absl::Cord& payload) { result.SetPayload(type, payload); });
  return result;
}

}  // namespace pagetide

#endif  // PAGETIDE_BASE_STATUS_CONTEXT_H_
