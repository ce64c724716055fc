// Log lines: "time level component message", to stderr. No token, prompt or key material is ever
// logged.
#ifndef PAGETIDE_BASE_LOG_H_
#define PAGETIDE_BASE_LOG_H_

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pagetide {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Thread-safe. `component` is a short fixed word: "worker", "store", "router", "rpc".
void Log(LogLevel level, absl::string_view component, absl::string_view message);
// INVALID_ARGUMENT unless `name` is debug, info, warning or error.
absl::Status SetLogLevel(absl::string_view name);
bool IsLogged(LogLevel level);

template <typename... Args>
void LogInfo(absl::string_view component, const Args&... args) {
  if (IsLogged(LogLevel::kInfo)) Log(LogLevel::kInfo, component, absl::StrCat(args...));
}
template <typename... Args>
void LogWarning(absl::string_view component, const Args&... args) {
  if (IsLogged(LogLevel::kWarning)) Log(LogLevel::kWarning, component, absl::StrCat(args...));
}
template <typename... Args>
void LogError(absl::string_view component, const Args&... args) {
  if (IsLogged(LogLevel::kError)) Log(LogLevel::kError, component, absl::StrCat(args...));
}

}  // namespace pagetide

#endif  // PAGETIDE_BASE_LOG_H_
