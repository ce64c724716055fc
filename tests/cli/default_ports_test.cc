// `pagetide up` listens where the other commands look for it.
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <string>

#include "cli/router_commands.h"
#include "cli/store_commands.h"
#include "cli/up_command.h"
#include "services/router_config.h"
#include "services/store_config.h"

namespace pagetide {
namespace {

std::string DefaultOf(const CLI::App& command, const std::string& flag) {
  const CLI::Option* const option = command.get_option_no_throw(flag);
  return option == nullptr ? "no flag " + flag : option->get_default_str();
}

TEST(DefaultPortsTest, EveryCommandAndProgramMeetsUp) {
  CLI::App app;
  AddUpCommand(app);
  AddWorkersCommand(app);
  const CLI::App& up = *app.get_subcommand("up");
  EXPECT_EQ(DefaultOf(*app.get_subcommand("workers"), "--router"),
            "127.0.0.1:" + DefaultOf(up, "--router-port"));
  EXPECT_EQ(RouterOptionsFromConfig({})->server.addresses.front(),
            "127.0.0.1:" + DefaultOf(up, "--router-port"));
  config::StoreConfig store;
  store.set_data_dir("d");
  EXPECT_EQ(StoreOptionsFromConfig(store)->role.server.addresses.front(),
            "127.0.0.1:" + DefaultOf(up, "--store-port"));
}

}  // namespace
}  // namespace pagetide
