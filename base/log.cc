#include "base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <string>

namespace pagetide {
namespace {

spdlog::level::level_enum ToSpd(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

// The sink is the one process-wide object: a log has no owner that could pass it to everyone.
spdlog::logger& Sink() {
  static const std::shared_ptr<spdlog::logger> logger = [] {
    auto made = spdlog::stderr_color_mt("pagetide");
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%e %L %v");
    return made;
  }();
  return *logger;
}

}  // namespace

void Log(LogLevel level, absl::string_view component, absl::string_view message) {
  Sink().log(ToSpd(level), "{}: {}", std::string(component), std::string(message));
}

absl::Status SetLogLevel(absl::string_view name) {
  if (name == "debug")
    Sink().set_level(spdlog::level::debug);
  else if (name == "info")
    Sink().set_level(spdlog::level::info);
  else if (name == "warning")
    Sink().set_level(spdlog::level::warn);
  else if (name == "error")
    Sink().set_level(spdlog::level::err);
  else {
    return absl::InvalidArgumentError(
        absl::StrCat("log level '", name, "' is not debug, info, warning or error"));
  }
  return absl::OkStatus();
}

bool IsLogged(LogLevel level) {
  return Sink().should_log(ToSpd(level));
}

}  // namespace pagetide
