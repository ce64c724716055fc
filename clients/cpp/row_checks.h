// What calls over rows check before they leave the client. Pure; thread-safe.
#ifndef PAGETIDE_CLIENTS_CPP_ROW_CHECKS_H_
#define PAGETIDE_CLIENTS_CPP_ROW_CHECKS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/model.h"

namespace pagetide {

// INVALID_ARGUMENT unless the model has this group and layer.
inline absl::Status CheckLayer(const Model& model, uint32_t group, uint32_t layer) {
  const PageGeometry& geometry = model.geometry();
  if (group >= geometry.num_groups() || layer >= geometry.group(group).num_layers()) {
    return absl::InvalidArgumentError(
        absl::StrCat("group ", group, ", layer ", layer, ": not in model ", model.spec().name));
  }
  return absl::OkStatus();
}

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_ROW_CHECKS_H_
