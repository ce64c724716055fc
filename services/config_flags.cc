#include "services/config_flags.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <vector>

namespace pagetide {

void AddConfigFlags(CLI::App* app, google::protobuf::Message* config,
                    const std::map<std::string, std::string>& help) {
  using google::protobuf::FieldDescriptor;
  const google::protobuf::Reflection* const reflection = config->GetReflection();
  for (int i = 0; i < config->GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* const field = config->GetDescriptor()->field(i);
    std::string name = "--" + field->name();
    std::replace(name.begin(), name.end(), '_', '-');
    const auto described = help.find(field->name());
    // A program does not fail for want of a help text: config_flags_test sees to it that all are
    // there.
    const std::string text = described == help.end() ? std::string() : described->second;
    if (field->is_repeated()) {
      app->add_option_function<std::vector<std::string>>(
             name,
             [=](const std::vector<std::string>& values) {
               for (const std::string& value : values) reflection->AddString(config, field, value);
             },
             text)
          ->allow_extra_args(false);  // one value a flag, so that nothing after it is swallowed
      continue;
    }
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING:
        app->add_option_function<std::string>(
            name, [=](const std::string& value) { reflection->SetString(config, field, value); },
            text);
        break;
      case FieldDescriptor::CPPTYPE_UINT32:
        app->add_option_function<uint32_t>(
            name, [=](const uint32_t& value) { reflection->SetUInt32(config, field, value); },
            text);
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        app->add_option_function<double>(
            name, [=](const double& value) { reflection->SetDouble(config, field, value); }, text);
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        // --x=false counts as -1.
        app->add_flag_function(
            name, [=](int64_t count) { reflection->SetBool(config, field, count > 0); }, text);
        break;
      default:
        break;  // no flag; config_flags_test finds it
    }
  }
}

}  // namespace pagetide
