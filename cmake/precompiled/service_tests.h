// Precompiled for tests that speak PageTide's own protocol (cmake/Precompiled.cmake).
#include "cmake/precompiled/services.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
