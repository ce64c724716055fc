#include "core/keys.h"

namespace pagetide {

TenantSalt DeriveTenantSalt(absl::string_view deployment_secret, absl::string_view tenant) {
  return {HmacSha256(deployment_secret, tenant)};
}

PrefixKey RootPrefixKey(const TenantSalt& salt, const Digest& model_identity,
                        uint32_t page_tokens) {
  Sha256 hash;
  hash.AppendField("pagetide.prefix.v1").AppendField(salt.digest.view());
  hash.AppendField(model_identity.view()).AppendU32(page_tokens);
  return {hash.Finish()};
}

PrefixKey NextPrefixKey(const PrefixKey& parent, std::span<const uint32_t> tokens,
                        uint64_t first_position, std::span<const PositionedInput> inputs) {
  Sha256 hash;
  hash.AppendField("pagetide.page.v1").AppendField(parent.digest.view()).AppendU64(tokens.size());
  for (uint32_t token : tokens) hash.AppendU32(token);
  hash.AppendU64(inputs.size());
  for (const PositionedInput& input : inputs) {
    hash.AppendU32(static_cast<uint32_t>(input.position - first_position));
    hash.AppendField(input.digest.view());
  }
  return {hash.Finish()};
}

std::vector<PrefixKey> PrefixKeysOf(const PrefixKey& root, std::span<const uint32_t> tokens,
                                    uint32_t page_tokens, std::span<const PositionedInput> inputs) {
  std::vector<PrefixKey> keys;
  keys.reserve(tokens.size() / page_tokens);
  PrefixKey parent = root;
  size_t first_input = 0;
  for (size_t at = 0; at + page_tokens <= tokens.size(); at += page_tokens) {
    size_t last_input = first_input;
    while (last_input < inputs.size() && inputs[last_input].position < at + page_tokens)
      ++last_input;
    parent = NextPrefixKey(parent, tokens.subspan(at, page_tokens), at,
                           inputs.subspan(first_input, last_input - first_input));
    first_input = last_input;
    keys.push_back(parent);
  }
  return keys;
}

PageKey MakePageKey(const PrefixKey& prefix, const Digest& component_fingerprint) {
  Sha256 hash;
  hash.AppendField("pagetide.component_page.v1").AppendField(prefix.digest.view());
  hash.AppendField(component_fingerprint.view());
  return {hash.Finish()};
}

PageKey MakePrivatePageKey(uint64_t incarnation, uint64_t page_id, uint64_t spill_number) {
  Sha256 hash;
  hash.AppendField("pagetide.private_page.v1").AppendU64(incarnation);
  hash.AppendU64(page_id).AppendU64(spill_number);
  return {hash.Finish()};
}

PageKey MakeContentPageKey(const TenantSalt& salt, const Digest& component_fingerprint,
                           uint32_t rows, std::span<const std::byte> body) {
  return PageKey{
      Sha256()
          .AppendField("pagetide.content_page.v1")
          .AppendField(salt.digest.view())
          .AppendField(component_fingerprint.view())
          .AppendU32(rows)
          .Append(absl::string_view(reinterpret_cast<const char*>(body.data()), body.size()))
          .Finish()};
}

}  // namespace pagetide
