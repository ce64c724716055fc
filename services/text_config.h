// Reads configuration files: text-format protobuf, where an unknown key or a wrong value is an
// error that names file, line and key. Stateless.
#ifndef PAGETIDE_SERVICES_TEXT_CONFIG_H_
#define PAGETIDE_SERVICES_TEXT_CONFIG_H_

#include <google/protobuf/message.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace pagetide {

// Replaces `config` by what `text` says. INVALID_ARGUMENT "read configuration NAME:LINE:COLUMN: …".
absl::Status ParseTextConfig(absl::string_view name, absl::string_view text,
                             google::protobuf::Message* config);
// Replaces `config` by what `path` says. NOT_FOUND when it cannot be read, INVALID_ARGUMENT
// otherwise.
absl::Status ReadTextConfig(const std::string& path, google::protobuf::Message* config);

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_TEXT_CONFIG_H_
