#include "cli/demo/scenes.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "cli/demo/plant.h"

namespace pagetide::demo {
namespace {

// Measures what the workers did between construction and Finish.
class SceneMeter {
 public:
  static absl::StatusOr<SceneMeter> Start(Stage& stage, std::string name, std::string what) {
    SceneMeter meter(stage, std::move(name), std::move(what));
    PT_ASSIGN_OR_RETURN(meter.before_, stage.player->Counters());
    return meter;
  }
  SceneReport& report() { return report_; }
  absl::StatusOr<SceneReport> Finish() {
    PT_ASSIGN_OR_RETURN(const WorkerCounters after, player_->Counters());
    report_.pages_spilled = after.pages_spilled - before_.pages_spilled;
    report_.pages_restored = after.pages_restored - before_.pages_restored;
    report_.bytes_verified = after.bytes_verified - before_.bytes_verified;
    report_.checksum_failures = after.checksum_failures - before_.checksum_failures;
    return std::move(report_);
  }

 private:
  SceneMeter(Stage& stage, std::string name, std::string what) : player_(stage.player) {
    report_.name = std::move(name);
    report_.what = std::move(what);
  }
  Player* player_;
  WorkerCounters before_;
  SceneReport report_;
};

void Append(std::vector<uint32_t>& tokens, absl::string_view text) {
  const std::vector<uint32_t> bytes = BytesOf(text);
  tokens.insert(tokens.end(), bytes.begin(), bytes.end());
}

}  // namespace

absl::StatusOr<SceneReport> PlaySharedPrefix(Stage& stage) {
  PT_ASSIGN_OR_RETURN(
      SceneMeter meter,
      SceneMeter::Start(stage, "shared prefix",
                        "400 + 200 shared tokens and suffixes of 80, 81, 82; all frames evicted "
                        "between requests"));
  PT_ASSIGN_OR_RETURN(const std::string shared, stage.texts->Cut("Apache-2.0", 0, 600));
  std::string worker;  // a page that matches only partly is known where it was made
  for (int i = 0; i < 3; ++i) {
    // The first token of each suffix differs.
    PT_ASSIGN_OR_RETURN(const std::string suffix,
                        stage.texts->Cut("GPL-3", 4000 + 500 * i, 79 + i));
    const auto conversation = stage.player->NewConversation();
    Append(conversation->tokens, absl::StrCat(shared, i + 1, suffix));
    PT_ASSIGN_OR_RETURN(
        RequestReport request,
        stage.player->Play(*conversation, {.name = absl::StrCat("400 + 200 + ", 80 + i),
                                           .new_tokens = 300,
                                           .measure_cold = i > 0,
                                           .sticky_worker_id = worker}));
    worker = request.worker_id;
    PT_RETURN_IF_ERROR(conversation->sequence->Close());
    PT_RETURN_IF_ERROR(stage.player->EvictAll());
    meter.report().requests.push_back(std::move(request));
  }
  return meter.Finish();
}

absl::StatusOr<SceneReport> PlayChat(Stage& stage) {
  constexpr int kTurns = 4;
  constexpr size_t kSystemTokens = 900;
  constexpr size_t kUserTokens = 150;
  constexpr int kAnswerTokens = 60;
  PT_ASSIGN_OR_RETURN(SceneMeter meter,
                      SceneMeter::Start(stage, "chat",
                                        "four turns, each a new request over the whole history; "
                                        "evicted while the user types"));
  const auto conversation = stage.player->NewConversation();
  PT_ASSIGN_OR_RETURN(const std::string system, stage.texts->Cut("MPL-2.0", 0, kSystemTokens));
  Append(conversation->tokens, system);
  std::string worker;
  for (int turn = 0; turn < kTurns; ++turn) {
    PT_ASSIGN_OR_RETURN(const std::string user,
                        stage.texts->Cut("LGPL-2.1", 3000 + 1000 * turn, kUserTokens));
    Append(conversation->tokens, absl::StrCat("\nUser: ", user, "\nAssistant: "));
    PT_ASSIGN_OR_RETURN(RequestReport request,
                        stage.player->Play(*conversation, {.name = absl::StrCat("turn ", turn + 1),
                                                           .new_tokens = kAnswerTokens,
                                                           .measure_cold = turn > 0,
                                                           .sticky_worker_id = worker}));
    worker = request.worker_id;
    PT_RETURN_IF_ERROR(conversation->sequence->Close());
    PT_RETURN_IF_ERROR(stage.player->EvictAll());
    meter.report().requests.push_back(std::move(request));
  }
  return meter.Finish();
}

absl::StatusOr<SceneReport> PlayQuestions(Stage& stage) {
  constexpr size_t kDocumentTokens = 2100;
  PT_ASSIGN_OR_RETURN(SceneMeter meter,
                      SceneMeter::Start(stage, "questions",
                                        "three questions over one document; evicted between them"));
  PT_ASSIGN_OR_RETURN(const std::string document, stage.texts->Cut("GPL-2", 0, kDocumentTokens));
  const std::vector<std::string> questions = {"\nQ: May I sell copies of the program?\nA: ",
                                              "\nQ: What must I give to those who receive it?\nA: ",
                                              "\nQ: Who bears the cost if it fails?\nA: "};
  for (size_t i = 0; i < questions.size(); ++i) {
    const auto conversation = stage.player->NewConversation();
    Append(conversation->tokens, absl::StrCat(document, questions[i]));
    PT_ASSIGN_OR_RETURN(RequestReport request,
                        stage.player->Play(*conversation, {.name = absl::StrCat("question ", i + 1),
                                                           .new_tokens = 24,
                                                           .measure_cold = i > 0}));
    PT_RETURN_IF_ERROR(conversation->sequence->Close());
    PT_RETURN_IF_ERROR(stage.player->EvictAll());
    meter.report().requests.push_back(std::move(request));
  }
  return meter.Finish();
}

absl::StatusOr<SceneReport> PlaySmallPool(Stage& stage) {
  constexpr size_t kConversations = 7;
  constexpr size_t kPromptTokens = 1100;  // 5 pages each
  const uint64_t pages = kConversations * ((kPromptTokens + kPageTokens - 1) / kPageTokens);
  PT_ASSIGN_OR_RETURN(
      SceneMeter meter,
      SceneMeter::Start(
          stage, "small pool",
          absl::StrCat(kConversations, " open conversations of ", pages, " pages take turns in ",
                       stage.fleet->num_workers() * kFramesPerWorker, " frames")));
  std::vector<std::unique_ptr<Conversation>> conversations;
  for (size_t i = 0; i < kConversations; ++i) {
    PT_ASSIGN_OR_RETURN(const std::string text,
                        stage.texts->Cut(Texts::Names()[i], 1000, kPromptTokens));
    conversations.push_back(stage.player->NewConversation());
    Append(conversations[i]->tokens, text);
    PT_ASSIGN_OR_RETURN(RequestReport request,
                        stage.player->Play(*conversations[i], {.name = absl::StrCat("open ", i + 1),
                                                               .new_tokens = 4}));
    meter.report().requests.push_back(std::move(request));
  }
  for (size_t i = 0; i < kConversations; ++i) {
    PT_ASSIGN_OR_RETURN(
        RequestReport request,
        stage.player->Continue(*conversations[i], absl::StrCat("continue ", i + 1), 8));
    meter.report().requests.push_back(std::move(request));
  }
  for (size_t i = 0; i < kConversations; ++i) {
    Conversation& conversation = *conversations[i];
    PT_RETURN_IF_ERROR(conversation.sequence->Close());
    Append(conversation.tokens, "\nIn one sentence: ");
    PT_ASSIGN_OR_RETURN(RequestReport request,
                        stage.player->Play(conversation, {.name = absl::StrCat("ask ", i + 1),
                                                          .new_tokens = 4,
                                                          .measure_cold = i == 0}));
    PT_RETURN_IF_ERROR(conversation.sequence->Close());
    meter.report().requests.push_back(std::move(request));
  }
  return meter.Finish();
}

absl::StatusOr<SceneReport> PlayDamagedDisk(Stage& stage) {
  constexpr size_t kDamagedPage = 1;
  PT_ASSIGN_OR_RETURN(
      SceneMeter meter,
      SceneMeter::Start(stage, "damaged disk",
                        "a byte of the second stored page is flipped in the store's "
                        "files"));
  const auto conversation = stage.player->NewConversation();
  PT_ASSIGN_OR_RETURN(const std::string text, stage.texts->Cut("GFDL-1.3", 5000, 700));
  Append(conversation->tokens, text);
  PT_ASSIGN_OR_RETURN(RequestReport before,
                      stage.player->Play(*conversation, {.name = "before", .new_tokens = 4}));
  // K rows of tokens in the middle of the page, as they lie in its record.
  const auto rows = conversation->oracle.kv().k_rows(0);
  const size_t row_bytes = rows.size() / conversation->tokens.size();
  const size_t first = kDamagedPage * kPageTokens + 10;
  const auto needle = rows.subspan(first * row_bytes, row_bytes);
  PT_RETURN_IF_ERROR(conversation->sequence->Close());
  PT_RETURN_IF_ERROR(stage.player->EvictAll());
  PT_RETURN_IF_ERROR(
      FlipOnDisk(stage.fleet->store_dir(),
                 absl::string_view(reinterpret_cast<const char*>(needle.data()), needle.size())));
  Append(conversation->tokens, "\nIn short: ");
  PT_ASSIGN_OR_RETURN(RequestReport after,
                      stage.player->Play(*conversation, {.name = "after", .new_tokens = 4}));
  PT_RETURN_IF_ERROR(conversation->sequence->Close());
  meter.report().requests = {std::move(before), std::move(after)};
  return meter.Finish();
}

absl::StatusOr<SceneReport> PlayKilledWorker(Stage& stage) {
  PT_ASSIGN_OR_RETURN(SceneMeter meter,
                      SceneMeter::Start(stage, "killed worker",
                                        "kill -9 of the worker that holds the conversation, which "
                                        "goes on at the other from the store"));
  const auto conversation = stage.player->NewConversation();
  PT_ASSIGN_OR_RETURN(const std::string text, stage.texts->Cut("GPL-3", 10000, 1200));
  Append(conversation->tokens, text);
  PT_ASSIGN_OR_RETURN(RequestReport before,
                      stage.player->Play(*conversation, {.name = "before", .new_tokens = 40}));
  // Counters of the victim, which also waits for the pages that are being written through.
  PT_RETURN_IF_ERROR(stage.player->Counters().status());
  const std::string victim = before.worker_id;
  size_t index = 0;
  while (index < stage.fleet->num_workers() && Fleet::WorkerId(index) != victim) ++index;
  if (index == stage.fleet->num_workers()) {
    return absl::InternalError(absl::StrCat("no worker of the demo is called ", victim));
  }
  stage.fleet->worker(index).Kill();
  const absl::Time killed_at = absl::Now();
  const absl::StatusOr<RequestReport> dead =
      stage.player->Continue(*conversation, "on the dead", 1);
  if (dead.ok()) return absl::InternalError("a killed worker went on decoding");
  const absl::Duration noticed = absl::Now() - killed_at;
  PT_ASSIGN_OR_RETURN(RequestReport after,
                      stage.player->Play(*conversation, {.name = "after", .new_tokens = 40}));
  meter.report().notes.push_back(absl::StrFormat(
      "the client noticed after %.0f ms (%s) and had the next token %.0f ms later",
      absl::ToDoubleMilliseconds(noticed), absl::StatusCodeToString(dead.status().code()),
      absl::ToDoubleMilliseconds(after.ttft)));
  PT_RETURN_IF_ERROR(conversation->sequence->Close());
  meter.report().requests = {std::move(before), std::move(after)};
  return meter.Finish();
}

absl::StatusOr<SceneReport> PlayPlantedFlip(Stage& stage) {
  PT_ASSIGN_OR_RETURN(
      SceneMeter meter,
      SceneMeter::Start(stage, "planted flip",
                        "workers that do not compare checksums; one bit of one K byte of the first "
                        "stored page is flipped"));
  const auto conversation = stage.player->NewConversation();
  PT_ASSIGN_OR_RETURN(const std::string text, stage.texts->Cut("GPL-3", 2000, 700));
  Append(conversation->tokens, text);
  PT_ASSIGN_OR_RETURN(RequestReport before,
                      stage.player->Play(*conversation, {.name = "before", .new_tokens = 4}));
  PT_ASSIGN_OR_RETURN(const std::string key, PageKeyOf(*conversation->sequence, 0));
  const GroupGeometry group = conversation->sequence->model().geometry().group(0);
  PT_RETURN_IF_ERROR(conversation->sequence->Close());
  PT_RETURN_IF_ERROR(stage.player->EvictAll());
  // The high byte of an element of token 17's K in layer 0 (little-endian f16).
  const uint64_t offset = group.RowOffset(0, RowKind::kK, 17) + 5;
  PT_RETURN_IF_ERROR(ReplaceInStore(stage.fleet->store_address(), key, group, offset));
  Append(conversation->tokens, "\nIn short: ");
  PT_ASSIGN_OR_RETURN(
      RequestReport after,
      stage.player->Play(*conversation,
                         {.name = "after", .new_tokens = 4, .sticky_worker_id = before.worker_id}));
  PT_RETURN_IF_ERROR(conversation->sequence->Close());
  meter.report().requests = {std::move(before), std::move(after)};
  return meter.Finish();
}

}  // namespace pagetide::demo
