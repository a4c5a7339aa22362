// Which instruction set the kernels run on: the best that this processor has, unless a caller insists.
#pragma once

#include <string>
#include <vector>

namespace bertfast {

std::string isa();
std::vector<std::string> available_isas();  // best first
void set_isa(const std::string& name);      // throws std::invalid_argument

}  // namespace bertfast
