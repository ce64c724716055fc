// The contract of core/page_store.h, as one suite over every implementation:
//
//   INSTANTIATE_TEST_SUITE_P(Memory, PageStoreContract, ::testing::Values(&MakeMemoryHarness));
//
// Each test gets a fresh, empty store from a harness. Headers of the suite define TEST_Ps: include
// this one in exactly one file of a test program.
#ifndef PAGETIDE_TESTS_CONTRACT_PAGE_STORE_CONTRACT_H_
#define PAGETIDE_TESTS_CONTRACT_PAGE_STORE_CONTRACT_H_

#include "tests/contract/page_store_manifests_contract.h"
#include "tests/contract/page_store_pages_contract.h"
#include "tests/contract/page_store_prefixes_contract.h"
#include "tests/contract/page_store_records_contract.h"
#include "tests/contract/page_store_retention_contract.h"

#endif  // PAGETIDE_TESTS_CONTRACT_PAGE_STORE_CONTRACT_H_
