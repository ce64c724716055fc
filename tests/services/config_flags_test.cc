// The flags of the three programs: every field of a configuration can be given on the command line,
// and --help says what it is.
#include "services/config_flags.h"

#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <string>

#include "services/router_config.h"
#include "services/store_config.h"
#include "services/worker_config.h"

namespace pagetide {
namespace {

template <typename Config>
void ExpectEveryFieldHasAFlagWithHelp(const std::map<std::string, std::string>& help) {
  const google::protobuf::Descriptor* const fields = Config::descriptor();
  Config config;
  CLI::App app;
  AddConfigFlags(&app, &config, help);
  ASSERT_GT(fields->field_count(), 0);
  for (int i = 0; i < fields->field_count(); ++i) {
    std::string name = "--" + fields->field(i)->name();
    std::replace(name.begin(), name.end(), '_', '-');
    const CLI::Option* const flag = app.get_option_no_throw(name);
    ASSERT_NE(flag, nullptr) << fields->full_name() << ": " << name << " is no flag";
    EXPECT_FALSE(flag->get_description().empty())
        << fields->full_name() << ": " << name << " has no text in --help";
  }
  for (const auto& [name, text] : help) {
    EXPECT_NE(fields->FindFieldByName(name), nullptr)
        << fields->full_name() << ": help for " << name << ", which is no field";
  }
}

TEST(ConfigFlagsTest, EveryFieldOfTheWorkersConfigurationHasAFlagWithHelp) {
  ExpectEveryFieldHasAFlagWithHelp<config::WorkerConfig>(WorkerFlagHelp());
}

TEST(ConfigFlagsTest, EveryFieldOfTheRoutersConfigurationHasAFlagWithHelp) {
  ExpectEveryFieldHasAFlagWithHelp<config::RouterConfig>(RouterFlagHelp());
}

TEST(ConfigFlagsTest, EveryFieldOfTheStoresConfigurationHasAFlagWithHelp) {
  ExpectEveryFieldHasAFlagWithHelp<config::StoreConfig>(StoreFlagHelp());
}

TEST(ConfigFlagsTest, AFieldWithoutHelpIsAFlagAllTheSame) {
  config::StoreConfig config;
  CLI::App app;
  AddConfigFlags(&app, &config, {});
  app.parse("--data-dir d");
  EXPECT_EQ(config.data_dir(), "d");
}

}  // namespace
}  // namespace pagetide
