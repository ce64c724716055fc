// Configuration of a worker: no text crashes the parser or the conversion to options, and what was
// parsed is parsed again from its own printing.
#include <google/protobuf/text_format.h>
#include <google/protobuf/util/message_differencer.h>

#include <string>

#include "services/text_config.h"
#include "services/worker_config.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  config::WorkerConfig config;
  const absl::Status status = ParseTextConfig(
      "input", absl::string_view(reinterpret_cast<const char*>(data), size), &config);
  if (!status.ok()) {
    FUZZ_CHECK(absl::IsInvalidArgument(status));
    return 0;
  }
  std::string printed;
  config::WorkerConfig again;
  if (google::protobuf::TextFormat::PrintToString(config, &printed)) {
    FUZZ_CHECK(ParseTextConfig("printed", printed, &again).ok());
    FUZZ_CHECK(google::protobuf::util::MessageDifferencer::Equivalent(config, again));
  }
  // Files that the text names are not the fuzzer's to read.
  config.clear_deployment_secret_file();
  (void)WorkerOptionsFromConfig(MergeWorkerConfig(config, again));
  return 0;
}
