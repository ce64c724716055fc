#include "worker/run_time_library.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"

namespace pagetide {
namespace {

absl::Status Refused(absl::string_view path, absl::string_view what, absl::string_view reason) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("use ", path, ": ", what)), reason);
}

}  // namespace

absl::StatusOr<RunTimeLibrary> RunTimeLibrary::Open(const std::string& path,
                                                    absl::string_view reason) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle != nullptr) return RunTimeLibrary(path, reason, handle);
  const char* const why = dlerror();
  return Refused(path, why == nullptr ? "it cannot be loaded" : why, reason);
}

absl::StatusOr<void*> RunTimeLibrary::Look(const char* name) const {
  void* const found = dlsym(handle_, name);
  if (found != nullptr) return found;
  return Refused(path_, absl::StrCat("it has no ", name), reason_);
}

}  // namespace pagetide
