#include "cli/demo_command.h"

#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "cli/demo/player.h"
#include "cli/demo/report.h"
#include "cli/demo/scenes.h"
#include "cli/demo/texts.h"
#include "cli/fleet.h"
#include "clients/cpp/client.h"
#include "decoder/pagetide_kv_backend.h"

namespace pagetide {
namespace {

using demo::DemoReport;
using demo::RequestReport;
using demo::SceneReport;
using demo::Stage;

struct DemoFlags {
  bool json = false;
  bool plant_flip = false;
  std::string texts = "/usr/share/common-licenses";
  std::string programs;
};

using Scene = absl::StatusOr<SceneReport> (*)(Stage&);

void AddCheck(DemoReport& report, bool holds, std::string sentence) {
  report.checks.push_back({std::move(sentence), holds});
}

void CheckSharedPrefix(const SceneReport& scene, DemoReport& report) {
  constexpr uint64_t kComputed[] = {680, 81, 82};
  constexpr uint64_t kReused[] = {0, 600, 600};
  constexpr uint64_t kNewPages[] = {4, 2, 2};
  bool holds = scene.requests.size() == 3;
  std::string seen;
  for (size_t i = 0; i < scene.requests.size(); ++i) {
    const RequestReport& r = scene.requests[i];
    if (i < 3) {
      holds = holds && r.computed_tokens == kComputed[i] && r.reused_tokens == kReused[i] &&
              r.new_pages == kNewPages[i];
    }
    absl::StrAppend(&seen, i == 0 ? "" : "; ", r.computed_tokens, "/", r.reused_tokens, "/",
                    r.new_pages);
  }
  AddCheck(report, holds,
           absl::StrCat("shared prefix: computed/reused/new pages are 680/0/4; 81/600/2; 82/600/2 "
                        "(seen ",
                        seen, ")"));
}

void CheckScene(const SceneReport& scene, DemoReport& report) {
  AddCheck(report, scene.Reused() > 0, absl::StrCat(scene.name, ": tokens were reused"));
  AddCheck(report, scene.pages_restored > 0,
           absl::StrCat(scene.name, ": pages came back from the store"));
  AddCheck(report, scene.LogitsDiffering() == 0,
           absl::StrCat(scene.name, ": all logits are identical to the oracle's"));
  AddCheck(report, scene.WrongBytes() == 0,
           absl::StrCat(scene.name, ": all K and V bytes are identical to the oracle's"));
  for (const RequestReport& r : scene.requests) {
    if (r.computed_tokens + r.reused_tokens == r.prompt_tokens) continue;
    AddCheck(report, false,
             absl::StrCat(scene.name, ", ", r.name, ": computed ", r.computed_tokens, " + reused ",
                          r.reused_tokens, " is not the prompt's ", r.prompt_tokens));
  }
}

void CheckPlantedFlip(const SceneReport& scene, DemoReport& report) {
  AddCheck(report, scene.Reused() > 0 && scene.pages_restored > 0,
           "planted flip: the page came back from the store");
  AddCheck(report, scene.requests.back().logits_differing > 0,
           "planted flip: the logits differ, so the comparison can fail");
  AddCheck(report, scene.WrongBytes() > 0, "planted flip: the bytes differ");
}

// The two decoders have the same weights: one is counted, the other is the oracle.
struct Decoders {
  std::unique_ptr<Decoder> service;
  std::unique_ptr<Decoder> oracle;
};

absl::Status PlayScenes(const DemoFlags& flags, const demo::Texts& texts, const ModelSpec& spec,
                        const Decoders& decoders, Fleet& fleet, DemoReport* report) {
  ClientOptions client_options;
  client_options.router_address = fleet.router_address();
  client_options.call.retry.max_attempts = 3;  // a killed worker is noticed soon
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Client> client, Client::Create(client_options));
  PT_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, client->RegisterModel(spec));
  demo::Player player(client.get(), std::move(model), decoders.service.get(),
                      decoders.oracle.get());
  Stage stage{&player, &texts, &fleet};

  const std::vector<Scene> scenes =
      flags.plant_flip ? std::vector<Scene>{demo::PlayPlantedFlip}
                       : std::vector<Scene>{demo::PlaySharedPrefix, demo::PlayChat,
                                            demo::PlayQuestions,    demo::PlaySmallPool,
                                            demo::PlayDamagedDisk,  demo::PlayKilledWorker};
  for (size_t i = 0; i < scenes.size(); ++i) {
    std::cerr << "scene " << i + 1 << " of " << scenes.size() << std::flush;
    PT_ASSIGN_OR_RETURN(SceneReport scene, scenes[i](stage));
    std::cerr << ": " << scene.name << "\n";
    if (flags.plant_flip) {
      CheckPlantedFlip(scene, *report);
    } else {
      if (i == 0) CheckSharedPrefix(scene, *report);
      CheckScene(scene, *report);
    }
    report->scenes.push_back(std::move(scene));
  }
  return absl::OkStatus();
}

absl::Status RunScenes(const DemoFlags& flags, DemoReport* report) {
  PT_ASSIGN_OR_RETURN(const demo::Texts texts, demo::Texts::Load(flags.texts));
  Decoders decoders;
  PT_ASSIGN_OR_RETURN(decoders.service, Decoder::Create(DecoderConfig()));
  PT_ASSIGN_OR_RETURN(decoders.oracle, Decoder::Create(DecoderConfig()));
  const ModelSpec spec = ModelSpecOf(*decoders.service, "reference-decoder", demo::kPageTokens);
  PT_ASSIGN_OR_RETURN(const Model model, Model::Create(spec));
  report->model_parameters = decoders.service->num_parameters();
  report->page_tokens = demo::kPageTokens;
  report->page_bytes = model.geometry().bytes_per_page_of_tokens();
  report->frames_per_worker = demo::kFramesPerWorker;

  FleetOptions options;
  options.program_dir = flags.programs;
  options.pool_bytes = demo::kFramesPerWorker * report->page_bytes;
  options.unsafe_skip_verify = flags.plant_flip;
  std::cerr << "starting a store, a router and " << options.num_workers << " workers\n";
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Fleet> fleet, Fleet::Start(options));
  // The client is gone before the programs stop: an idle gRPC channel reads a server's goodbye only
  // every five seconds, and each program would wait for that.
  PT_RETURN_IF_ERROR(PlayScenes(flags, texts, spec, decoders, *fleet, report));
  const absl::Status stopped = fleet->Stop();
  AddCheck(*report, stopped.ok(),
           stopped.ok() ? "all programs ended with exit code 0 after SIGTERM"
                        : std::string(stopped.message()));
  return absl::OkStatus();
}

absl::Status RunDemo(const DemoFlags& flags, std::ostream& out) {
  DemoReport report;
  report.mode = flags.plant_flip ? "plant-flip" : "verify";
  const absl::Time start = absl::Now();
  const absl::Status status = RunScenes(flags, &report);
  report.took = absl::Now() - start;
  if (!status.ok()) AddCheck(report, false, absl::StrCat("ran to the end: ", status.message()));
  if (flags.json) {
    demo::PrintJson(report, out);
  } else {
    demo::PrintTable(report, out);
  }
  if (!status.ok()) return status;
  if (!report.AllHold()) return absl::InternalError("demo: not all checks hold");
  return absl::OkStatus();
}

}  // namespace

CommandRunner AddDemoCommand(CLI::App& app) {
  const auto flags = std::make_shared<DemoFlags>();  // shared by the parser and the runner
  CLI::App* command = app.add_subcommand(
      "demo",
      "Run a small transformer over a store, a router and two workers and compare every bit with "
      "the same model over plain arrays");
  command->add_flag("--json", flags->json, "Print JSON instead of a table");
  command->add_flag("--plant-flip", flags->plant_flip,
                    "Switch checksums off, flip one stored bit, and expect the logits to differ");
  command->add_option("--texts", flags->texts, "Folder of the licence texts")
      ->capture_default_str();
  command->add_option(
      "--programs", flags->programs,
      "Folder of pagetide-store, -router and -worker (default: beside this program)");
  return [flags](std::ostream& out) { return RunDemo(*flags, out); };
}

}  // namespace pagetide
